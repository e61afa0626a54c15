"""expert_route: choose each token's experts, reroute them through its adapter's expert map, bucket them by slot."""

from torch import Tensor

from kernels.compiled import takes
from kernels.expert_route import reference
from kernels.expert_route.routing import GroupScore, Routed, Routing, Score, TokenBatch

__all__ = ["GroupScore", "Routed", "Routing", "Score", "TokenBatch", "expert_route"]


def expert_route(
    logits: Tensor,
    routing: Routing,
    expert_map: Tensor,
    num_slots: int,
    batch: TokenBatch,
    tile_rows: int,
    bias: Tensor | None = None,
) -> Routed:
    """See reference.py for shapes."""
    if takes(logits):
        from kernels.expert_route import kernel

        return kernel.expert_route(logits, routing, expert_map, num_slots, batch, tile_rows, bias)
    return reference.expert_route(logits, routing, expert_map, num_slots, batch, tile_rows, bias)
