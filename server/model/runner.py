"""Compute a step: a plan in, an output for each lane that samples."""

from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kernels.sampling import Sampled
from server.engine.masks import Mask, MaskSource
from server.engine.plan import Output, Plan
from server.engine.request import Lane, Token, ToldOfPrompt
from server.model.batch import Batch
from server.model.copies import Computing, to_device
from server.model.forward import Computed, Forward
from server.model.inputs import AdapterTables, HostStep
from server.model.of_prompt import NotFinite, PromptChunk, prompt_chunks
from server.model.sampler import SampledRows, Sampler

NOT_FINITE = "the model's output is not finite"  # weights of an adapter can be finite and still overflow


class ModelRunner:
    """Implements the engine's Runner protocol."""

    def __init__(
        self, forward: Forward, tables: AdapterTables, block_size: int, masks: MaskSource, overlaps: bool = False
    ) -> None:
        """overlaps: steps are launched before the tokens of the one before are known."""
        self.forward, self._tables, self._block_size, self._masks = forward, tables, block_size, masks
        self._overlaps = overlaps
        self._batch: Batch | None = None  # of the last step

    @torch.inference_mode()
    def launch(self, plan: Plan) -> "LaunchedStep":
        batch = self._batch
        if batch is None or not batch.goes_on(plan):
            batch = self._batch = self._new_batch(plan)
        step, sampler, asked = batch.step, batch.sampler, batch.asked
        draws = sampler.draws(batch.lengths)
        hidden: Tensor | None = None
        # with others in the step, its masks are waited for while the one before is computed, and no longer
        before = Computing(self.forward.last.tokens.device) if self._overlaps and batch.constrained else None
        if any(it.pools for it in asked):
            logits, hidden = self.forward.logits_and_hidden(step)
            computed = Computed(logits)
        else:
            computed = self.forward.compute(step, None if asked else draws)
        told = prompt_chunks(batch.plan, computed.logits, hidden) if asked else {}
        masks = self._collected(batch.constrained, plan, before) if batch.constrained else {}
        rows = None
        if batch.lanes:
            out = Sampled(*(it[: len(batch.lanes)] for it in self.forward.last)) if self._overlaps else None
            fed_back = batch.fed_back(self.forward.token_ids) if self._overlaps else None
            logits = _sampled(computed.logits, step)
            _, rows = sampler.sample(logits, draws, masks, computed.sampled, fed_back, out)
        late = frozenset(lane for lane in batch.constrained if lane.request.id not in masks)
        return LaunchedStep(batch.ending, batch.lanes, rows, told, late)

    def _new_batch(self, plan: Plan) -> Batch:
        last = self._batch
        rows, sampler = (last.chosen_rows, last.sampler) if last else ({}, Sampler(()))
        return Batch(plan, self._tables, self._block_size, rows, sampler)

    def _collected(self, constrained: Sequence[Lane], plan: Plan, before: Computing | None) -> Mapping[int, Mask]:
        """Those that are there when the logits are, or sooner where others wait for the step `before`; by request."""
        ids = [lane.request.id for lane in constrained]
        is_nobody_else = len(ids) == len({it.lane.request.id for it in plan})
        if before is None or is_nobody_else:
            before = Computing(self.forward.last.tokens.device)
        return self._masks.collect(ids, before, may_wait=is_nobody_else)

    def lay_out(self, plan: Plan) -> HostStep:
        """The numbers that a plan would be computed with."""
        return self._new_batch(plan).step


class LaunchedStep:
    """A step whose outputs are on the device, or will be."""

    def __init__(
        self,
        ending: Sequence[Lane],
        chosen_for: Sequence[Lane],
        rows: SampledRows | None,
        told: Mapping[Lane, PromptChunk],
        late: Collection[Lane],
    ) -> None:
        """rows: of `chosen_for`. told: of prompts that were asked about, in which the step has tokens. late: those for
        which there was no mask, so that what was chosen for them is nothing."""
        self._ending, self._chosen_for, self._rows, self._told = ending, chosen_for, rows, told
        self._late = late

    @torch.inference_mode()
    def outputs(self) -> Mapping[Lane, Output]:
        if self._rows is not None and not (self._rows.is_told_of or self._told or self._late):
            ids = self._rows.read_ids()
            return {
                lane: _plain(token) if lane.request.max_tokens else _wants_none(token)
                for lane, token in zip(self._chosen_for, ids, strict=True)
            }
        tokens = [] if self._rows is None else self._rows.read()
        by_lane = dict(zip(self._chosen_for, tokens, strict=True))
        told: dict[Lane, ToldOfPrompt | None] = {}
        for lane, chunk in self._told.items():
            try:
                told[lane] = chunk.read()
            except NotFinite:
                by_lane[lane] = None
        outputs: dict[Lane, Output] = {}
        for lane in self._ending:
            if lane in by_lane:
                outputs[lane] = _output(lane, by_lane[lane], told.get(lane))
            else:
                outputs[lane] = Output(of_prompt=told.get(lane))
            if lane in self._late and outputs[lane].error is None:
                outputs[lane] = Output(of_prompt=told.get(lane), is_late=True)
        return outputs


def _sampled(logits: Tensor, step: HostStep) -> Tensor:
    """The rows that tokens are chosen with."""
    if len(step.sample_rows) == len(step.logit_rows):
        return logits
    at = {row: index for index, row in enumerate(step.logit_rows.tolist())}
    rows = [at[row] for row in step.sample_rows.tolist()]
    return logits.index_select(0, to_device(rows, torch.int64, logits.device))


@lru_cache(maxsize=4096)
def _plain(token: int) -> Output:
    """Nothing but a token, mostly one that came not long ago; -1: what is not finite."""
    return Output((Token(token),)) if token >= 0 else _NOT_FINITE


def _wants_none(token: int) -> Output:
    return Output() if token >= 0 else _NOT_FINITE


def _output(lane: Lane, token: Token | None, told: ToldOfPrompt | None = None) -> Output:
    """token: None for what is not finite."""
    if token is None:
        return _NOT_FINITE
    return Output((token,) if lane.request.max_tokens else (), of_prompt=told)


_NOT_FINITE = Output(error=NOT_FINITE, is_not_finite=True)
