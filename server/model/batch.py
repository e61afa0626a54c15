"""What a step is of: the lanes, in order, and what stays the same for as long as the same ones go on decoding."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import is_

import numpy as np
from torch import Tensor

from server.engine.plan import Plan
from server.engine.request import Lane, Request
from server.model.edits import FedBack
from server.model.inputs import AdapterTables, HostStep, Integers, integers, lay_out
from server.model.sampler import Sampler


class Batch:
    """step: as the host has it. asked: those of which prompts something is to be told. chosen_rows: where a token is
    chosen for each request."""

    def __init__(
        self, plan: Plan, tables: AdapterTables, block_size: int, chosen_rows: Mapping[Request, int], last: Sampler
    ) -> None:
        """chosen_rows: of the step before. last: its sampler, which does as well for the same requests."""
        self.plan = sorted(plan, key=lambda it: it.lane.slot)  # so that each adapter's rows are one segment
        self.step = lay_out(self.plan, tables, block_size, chosen_rows)
        self.asked = [it for it in self.plan if it.lane.request.of_prompt is not None]
        chosen_for = [it for it in self.plan if it.chooses] if self.asked else [it for it in self.plan if it.samples]
        self.lanes = [it.lane for it in chosen_for]
        self._rows: list[int] | None = None  # of `lanes` among those of the plan; None: all of them
        if len(chosen_for) < len(self.plan):
            self._rows = [row for row, it in enumerate(self.plan) if it.chooses]
        self.constrained = [lane for lane in self.lanes if lane.request.is_constrained]
        requests = [lane.request for lane in self.lanes]
        self.sampler = last if last.requests == requests else Sampler(requests)
        self.chosen_rows = {request: row for row, request in enumerate(requests)}
        self._in_plan, *columns = zip(*plan, strict=True)
        starts, counts, samples = columns
        self._next: tuple[tuple[int, ...], ...] | None = None  # starts, numbers of tokens, samples
        if self.step.is_decode and not self.asked and all(samples):
            self._next = tuple(start + 1 for start in starts), counts, samples

    @property
    def lengths(self) -> Integers:
        """Of the lanes that a token is chosen for, before it."""
        kv_lens = self.step.kv_lens
        return kv_lens if self._rows is None else kv_lens[self._rows]

    def fed_back(self, token_ids: Tensor) -> FedBack | None:
        """Which tokens of these lanes only the device knows. token_ids: of this step, there."""
        step = self.step
        if step.sources is None:
            return None
        rows = np.where(step.sources >= 0, step.query_starts[1:] - 1, -1)
        return FedBack(rows if self._rows is None else rows[self._rows], token_ids)

    @property
    def ending(self) -> Sequence[Lane]:
        """Those that an output is wanted of."""
        return [it.lane for it in self.plan if it.samples] if self.asked else self.lanes

    def goes_on(self, plan: Plan) -> bool:
        """Whether the plan is the next token of each of the same lanes; if so, `step` is that now."""
        lanes, *columns = zip(*plan, strict=True)
        if lanes != self._in_plan or tuple(columns) != self._next:
            return False
        # one that gave way and started anew has other blocks, and perhaps another slot
        if not all(map(is_, self.step.block_tables, [lane.block_table for lane in self.lanes])):
            return False
        starts, counts, samples = columns
        self._next = tuple(start + 1 for start in starts), counts, samples
        self.step = self._following(self.step)
        return True

    def _following(self, step: HostStep) -> HostStep:
        lanes, kv_lens = self.lanes, step.kv_lens + 1
        is_unknown = kv_lens > integers([len(lane.tokens) for lane in lanes])
        if not is_unknown.any():
            token_ids = integers([lane.tokens[-1] for lane in lanes])
            return replace(step, kv_lens=kv_lens, token_ids=token_ids, sources=None)
        token_ids, sources = np.zeros(len(lanes), np.int32), np.arange(len(lanes), dtype=np.int32)
        for row in np.flatnonzero(~is_unknown):
            token_ids[row], sources[row] = lanes[row].tokens[-1], -1
        return replace(step, kv_lens=kv_lens, token_ids=token_ids, sources=sources)
