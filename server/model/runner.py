"""Compute a step: a plan in, one token for each request that samples out."""

from collections.abc import Sequence

import torch

from server.model.forward import Forward
from server.model.inputs import AdapterTables, ScheduledLike, lay_out
from server.model.sampler import sample


class ModelRunner:
    def __init__(self, forward: Forward, tables: AdapterTables, block_size: int) -> None:
        self.forward, self._tables, self._block_size = forward, tables, block_size

    @torch.inference_mode()
    def run(self, plan: Sequence[ScheduledLike]) -> dict[int, int | None]:
        """Compute the scheduled tokens. By id of each request that samples: its token, or None if its logits are not
        finite (weights of an adapter can be finite and still overflow)."""
        ordered = sorted(plan, key=lambda scheduled: scheduled.request.slot)
        logits = self.forward.logits(lay_out(ordered, self._tables, self._block_size))
        requests = [scheduled.request for scheduled in ordered if scheduled.samples]
        if not requests:
            return {}
        tokens = sample(logits, [r.sampling for r in requests], [r.num_generated for r in requests])
        return {request.id: token for request, token in zip(requests, tokens, strict=True)}
