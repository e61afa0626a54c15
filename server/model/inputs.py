"""One step: first as lists on the host, then as tensors. Long-lived objects own memory; these own indices."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kernels import host
from kernels.adapter_rows import MANY_TILE_ROWS, AdapterRows, AdapterTiles, Segment, ShapeKey, cut
from kernels.paged_attention import AttentionBatch, DeviceBatch
from server.engine.plan import Scheduled

_NO_COUNTERS = torch.zeros(0, dtype=torch.int32)  # the host's kernels need none


class AdapterTables(Protocol):
    """Which adapters are on the device. What kernels read of them was given to the injected modules at start."""

    def shape_key(self, slot: int) -> ShapeKey:
        """Of the adapter in the slot; ShapeKey() for the base."""


@dataclass(frozen=True)
class HostStep:
    """Tokens of all lanes, flattened; lanes in order of adapter slot, so that each adapter is one segment.

    Running example: lane a (slot 2) decodes its 6th token, b (base) prefills 3 tokens.
        token_ids   [b b b a]    positions [2 3 4 5]    token_slots [0 0 0 2]
        query_lens  [3 1]        kv_lens   [5 6]        sample_rows [2 3]
        spans       [(3, 4, 2)]  logit_rows [2 3]       logit_spans [(1, 2, 2)]   (of the logits' rows b, a)

    If b asks for log-probabilities of its prompt, logit_rows are [0 1 2 3] and logit_spans [(3, 4, 2)].
    """

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slot_mapping: list[int] = field(default_factory=list)  # KV slot of each token: block * block_size + offset
    token_slots: list[int] = field(default_factory=list)  # adapter slot of each token
    query_lens: list[int] = field(default_factory=list)
    kv_lens: list[int] = field(default_factory=list)
    block_tables: list[list[int]] = field(default_factory=list)
    sample_rows: list[int] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)  # whose logits are wanted: sample_rows, and what is told of
    spans: list[Segment] = field(default_factory=list)  # rows of adapters, of whatever kind
    logit_spans: list[Segment] = field(default_factory=list)  # the same for the rows of the logits
    shape: ShapeKey = ShapeKey()  # of all adapters of the batch

    @property
    def is_decode(self) -> bool:
        """Every sequence computes one token, and its logits are wanted: of what is pooled they are not."""
        return len(self.token_ids) == len(self.logit_rows) == len(self.query_lens)


def lay_out(plan: Sequence[Scheduled], tables: AdapterTables, block_size: int) -> HostStep:
    """`plan` is in order of adapter slot."""
    slots = {scheduled.lane.slot for scheduled in plan}
    shape = reduce(ShapeKey.joined, map(tables.shape_key, slots), ShapeKey())
    step = HostStep(shape=shape)
    for scheduled in plan:
        lane, start, end = scheduled.lane, scheduled.start, scheduled.start + scheduled.num_tokens
        table = lane.block_table
        _extend(step.spans, lane.slot, len(step.token_ids), scheduled.num_tokens)
        step.token_ids.extend(lane.tokens[start:end])
        step.positions.extend(range(start, end))
        step.slot_mapping.extend(table[p // block_size] * block_size + p % block_size for p in range(start, end))
        step.token_slots.extend([lane.slot] * scheduled.num_tokens)
        step.query_lens.append(scheduled.num_tokens)
        step.kv_lens.append(end)
        step.block_tables.append(table)
        if lane.request.of_prompt is not None:
            _add_logits(step, scheduled)
        elif scheduled.samples:
            _extend(step.logit_spans, lane.slot, len(step.logit_rows), 1)
            step.logit_rows.append(len(step.token_ids) - 1)
            step.sample_rows.append(len(step.token_ids) - 1)
    return step


def _add_logits(step: HostStep, scheduled: Scheduled) -> None:
    """Rows of the tokens that were added last, of whose prompt something is asked."""
    wanted, end = scheduled.logit_positions, len(step.token_ids)
    first = end - (scheduled.start + scheduled.num_tokens - wanted.start)
    if wanted:
        _extend(step.logit_spans, scheduled.lane.slot, len(step.logit_rows), len(wanted))
        step.logit_rows.extend(range(first, first + len(wanted)))
    if scheduled.chooses:
        step.sample_rows.append(end - 1)


def _extend(spans: list[Segment], slot: int, row: int, count: int) -> None:
    """Add rows [row, row + count) of `slot`, merged with a neighbour's of the same; none of the base's."""
    if slot == 0:
        return
    if spans and spans[-1].slot == slot and spans[-1].end == row:
        spans[-1] = Segment(spans[-1].start, row + count, slot)
    else:
        spans.append(Segment(row, row + count, slot))


@dataclass(frozen=True)
class TokenField:
    """A number a token that the ops of some kind of part want to know, beside the token's adapter slot.

    `filler` is that of a token that only pads the batch.
    """

    name: str
    values: Callable[[HostStep], Sequence[int]]
    filler: int = 0


@dataclass(frozen=True)
class StepInputs:
    """A step as tensors, for the host's path or for kernels. Integers are int64 there (what describes
    sequences and adapters int32) and int32 here."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    slot_mapping: Tensor  # [T]; -1: a token that only pads the batch
    fresh_blocks: Tensor | None  # KV blocks that come into use with this step; None: nobody reads past an end
    attention: AttentionBatch | DeviceBatch
    logit_rows: Tensor  # [R]: rows whose logits are wanted
    rows: AdapterRows
    # for expert_route's kernel: how many tokens are real, and its counters
    num_tokens: Tensor | None = None  # [1]
    route_counters: Tensor | None = None  # [2], zero; left zero
    fields: Mapping[str, Tensor] = field(default_factory=dict)  # [T] each, by name of their TokenField


def of_all_rows(inputs: StepInputs) -> StepInputs:
    """The same step, with every token's logits wanted: adapters' rows of them are those of the tokens."""
    it = inputs.logit_rows
    rows = torch.arange(len(inputs.token_ids), dtype=it.dtype, device=it.device)
    return replace(inputs, logit_rows=rows, rows=inputs.rows._replace(sampled=inputs.rows.tiles))


class CurrentStep:
    """Where injected modules find the step being computed. One for each loaded model; steps do not nest."""

    def __init__(self) -> None:
        self._inputs: StepInputs | None = None

    @property
    def inputs(self) -> StepInputs:
        assert self._inputs is not None, "the model was called outside a step"
        return self._inputs

    @contextmanager
    def of(self, inputs: StepInputs) -> Iterator[None]:
        assert self._inputs is None, "steps do not nest"
        self._inputs = inputs
        try:
            yield
        finally:
            self._inputs = None


def host_inputs(
    step: HostStep, block_size: int, dtype: torch.dtype, token_fields: Sequence[TokenField] = ()
) -> StepInputs:
    """For the host's kernels, or the references where there are none. `dtype` is the model's."""
    slot_mapping = torch.tensor(step.slot_mapping)
    by_kernels = host.takes_on(torch.device("cpu"), dtype)
    return StepInputs(
        token_ids=torch.tensor(step.token_ids),
        positions=torch.tensor(step.positions),
        slot_mapping=slot_mapping,
        # a block is taken for the token that begins it
        fresh_blocks=None if by_kernels else slot_mapping[slot_mapping % block_size == 0] // block_size,
        attention=_host_batch(step)
        if by_kernels
        else AttentionBatch(step.query_lens, step.kv_lens, step.block_tables, block_size, dtype),
        logit_rows=torch.tensor(step.logit_rows, dtype=torch.int64),
        rows=AdapterRows(
            torch.tensor(step.token_slots, dtype=torch.int32) if any(step.shape) else None,
            _host_tiles(step.spans, by_kernels),
            _host_tiles(step.logit_spans, by_kernels),
            step.shape,
        ),
        fields={it.name: torch.tensor(it.values(step)) for it in token_fields},
    )


def _host_batch(step: HostStep) -> DeviceBatch:
    starts = torch.zeros(len(step.query_lens) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(step.query_lens), 0, out=starts[1:])
    tables = np.zeros((len(step.block_tables), max(map(len, step.block_tables), default=0)), np.int32)
    for row, table in zip(tables, step.block_tables, strict=True):
        row[: len(table)] = table
    return DeviceBatch(starts, torch.tensor(step.kv_lens, dtype=torch.int32), torch.from_numpy(tables),
                       _NO_COUNTERS, max(step.query_lens))  # fmt: skip


def _host_tiles(spans: Sequence[Segment], by_kernels: bool) -> AdapterTiles:
    if not by_kernels:
        return AdapterTiles(spans)
    tiles = torch.tensor(cut(spans, MANY_TILE_ROWS), dtype=torch.int32).view(-1, 3)
    return AdapterTiles(spans, tiles, tile_rows=MANY_TILE_ROWS)
