"""Compute a step: a plan in, an output for each lane that samples."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from server.engine.masks import Mask, MaskSource
from server.engine.plan import Output, Plan, Scheduled
from server.engine.request import Lane, Token, ToldOfPrompt
from server.model.copies import Computing, to_device
from server.model.forward import Forward
from server.model.inputs import AdapterTables, HostStep, lay_out
from server.model.of_prompt import NotFinite, PromptChunk, prompt_chunks
from server.model.sampler import SampledRows, sample

NOT_FINITE = "the model's output is not finite"  # weights of an adapter can be finite and still overflow


class ModelRunner:
    """Implements the engine's Runner protocol."""

    def __init__(self, forward: Forward, tables: AdapterTables, block_size: int, masks: MaskSource) -> None:
        self.forward, self._tables, self._block_size, self._masks = forward, tables, block_size, masks

    @torch.inference_mode()
    def launch(self, plan: Plan) -> "LaunchedStep":
        ordered = _in_order(plan)
        step = lay_out(ordered, self._tables, self._block_size)
        asked = [it for it in ordered if it.lane.request.of_prompt is not None]
        hidden: Tensor | None = None
        if any(it.pools for it in asked):
            logits, hidden = self.forward.logits_and_hidden(step)
        else:
            logits = self.forward.logits(step)
        told = prompt_chunks(ordered, logits, hidden) if asked else {}
        chosen_for = [it for it in ordered if it.chooses]
        constrained = [it for it in chosen_for if it.lane.request.is_constrained]
        masks = self._collected(constrained, logits.device, plan) if constrained else {}
        late = frozenset(it.lane for it in constrained if it.lane.request.id not in masks)
        rows = sample(_sampled(logits, step), [it.lane.request for it in chosen_for], masks) if chosen_for else None
        return LaunchedStep([it for it in ordered if it.samples], chosen_for, rows, told, late)

    def _collected(self, constrained: Sequence[Scheduled], device: torch.device, plan: Plan) -> Mapping[int, Mask]:
        """Those that are there when the logits are, by request."""
        ids = [it.lane.request.id for it in constrained]
        is_nobody_else = len(ids) == len({it.lane.request.id for it in plan})
        return self._masks.collect(ids, Computing(device), may_wait=is_nobody_else)

    def lay_out(self, plan: Plan) -> HostStep:
        """The lists that a plan is computed with."""
        return lay_out(_in_order(plan), self._tables, self._block_size)


class LaunchedStep:
    """A step whose outputs are on the device, or will be."""

    def __init__(
        self,
        ending: Sequence[Scheduled],
        chosen_for: Sequence[Scheduled],
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
        tokens: dict[Lane, Token | None] = {}
        if self._rows is not None:
            tokens = {it.lane: token for it, token in zip(self._chosen_for, self._rows.read(), strict=True)}
        told: dict[Lane, ToldOfPrompt | None] = {}
        for lane, chunk in self._told.items():
            try:
                told[lane] = chunk.read()
            except NotFinite:
                tokens[lane] = None
        outputs = {it.lane: _output(it.lane, tokens, told.get(it.lane)) for it in self._ending}
        for lane in self._late:
            if outputs[lane].error is None:
                outputs[lane] = Output(of_prompt=told.get(lane), is_late=True)
        return outputs


def _in_order(plan: Plan) -> Plan:
    """Of adapter slots, so that each adapter's rows are one segment."""
    return sorted(plan, key=lambda scheduled: scheduled.lane.slot)


def _sampled(logits: Tensor, step: HostStep) -> Tensor:
    """The rows that tokens are chosen with."""
    if len(step.sample_rows) == len(step.logit_rows):
        return logits
    at = {row: index for index, row in enumerate(step.logit_rows)}
    return logits.index_select(0, to_device([at[row] for row in step.sample_rows], torch.int64, logits.device))


def _output(lane: Lane, tokens: Mapping[Lane, Token | None], told: ToldOfPrompt | None) -> Output:
    """tokens: of the lanes that one was chosen for; None for what is not finite."""
    token = tokens.get(lane)
    if token is None and lane in tokens:
        return Output(error=NOT_FINITE, is_not_finite=True)
    return Output((token,) if token is not None and lane.request.max_tokens else (), of_prompt=told)
