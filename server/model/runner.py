"""Compute a step: a plan in, one token for each request that samples out."""

from collections.abc import Sequence

import torch
from torch import nn

from server.model.inputs import AdapterTables, CurrentStep, ScheduledLike, build_inputs
from server.model.sampler import sample


class ModelRunner:
    def __init__(self, model: nn.Module, step: CurrentStep, tables: AdapterTables, block_size: int) -> None:
        self._model = model
        self._step = step
        self._tables = tables
        self._block_size = block_size
        self._dtype = next(model.parameters()).dtype

    @torch.inference_mode()
    def run(self, plan: Sequence[ScheduledLike]) -> dict[int, int | None]:
        """Compute the scheduled tokens. By id of each request that samples: its token, or None if its logits are not
        finite (weights of an adapter can be finite and still overflow)."""
        ordered = sorted(plan, key=lambda scheduled: scheduled.request.slot)
        inputs = build_inputs(ordered, self._tables, self._block_size, self._dtype)
        with self._step.of(inputs):
            logits = self._model(
                input_ids=inputs.token_ids[None],
                position_ids=inputs.positions[None],
                use_cache=False,
                logits_to_keep=inputs.sample_rows,
            ).logits[0]
        requests = [scheduled.request for scheduled in ordered if scheduled.samples]
        finite = logits.isfinite().all(-1)
        tokens = sample(logits.nan_to_num(), [r.sampling for r in requests], [r.num_generated for r in requests])
        return {r.id: token if ok else None for r, token, ok in zip(requests, tokens, finite.tolist(), strict=True)}
