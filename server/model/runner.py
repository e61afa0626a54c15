"""Compute a step: a plan in, an output for each lane that samples."""

from collections.abc import Mapping, Sequence

import torch

from server.engine.plan import Output, Plan, Scheduled
from server.engine.request import Lane, Token
from server.model.forward import Forward
from server.model.inputs import AdapterTables, HostStep, lay_out
from server.model.sampler import SampledRows, sample

NOT_FINITE = "the model's output is not finite"  # weights of an adapter can be finite and still overflow


class ModelRunner:
    """Implements the engine's Runner protocol."""

    def __init__(self, forward: Forward, tables: AdapterTables, block_size: int) -> None:
        self.forward, self._tables, self._block_size = forward, tables, block_size

    @torch.inference_mode()
    def launch(self, plan: Plan) -> "LaunchedStep":
        ordered = _in_order(plan)
        logits = self.forward.logits(lay_out(ordered, self._tables, self._block_size))
        sampling = [scheduled for scheduled in ordered if scheduled.samples]
        if not sampling:
            return LaunchedStep((), None)
        requests = [scheduled.lane.request for scheduled in sampling]
        rows = sample(logits, [it.sampling for it in requests], [it.num_generated for it in requests])
        return LaunchedStep(sampling, rows)

    def lay_out(self, plan: Plan) -> HostStep:
        """The lists that a plan is computed with."""
        return lay_out(_in_order(plan), self._tables, self._block_size)


class LaunchedStep:
    """A step whose tokens are on the device, or will be."""

    def __init__(self, sampling: Sequence[Scheduled], rows: SampledRows | None) -> None:
        self._sampling, self._rows = sampling, rows

    @torch.inference_mode()
    def outputs(self) -> Mapping[Lane, Output]:
        if self._rows is None:
            return {}
        return {it.lane: _output(it, token) for it, token in zip(self._sampling, self._rows.read(), strict=True)}


def _in_order(plan: Plan) -> Plan:
    """Of adapter slots, so that each adapter's rows are one segment."""
    return sorted(plan, key=lambda scheduled: scheduled.lane.slot)


def _output(scheduled: Scheduled, token: int | None) -> Output:
    if token is None:
        return Output(error=NOT_FINITE)
    return Output((Token(token),)) if scheduled.lane.request.max_tokens else Output()
