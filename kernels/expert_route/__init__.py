"""expert_route: choose each token's experts, reroute them through its adapter's expert map, bucket them by place.

An expert place is a row of the expert stack: the base's experts first, the adapters' behind them.
"""

from torch import Tensor

from kernels.compiled import takes
from kernels.expert_route import reference
from kernels.expert_route.routing import GroupScore, Routed, Routing, Score, TokenBatch

__all__ = ["GroupScore", "Routed", "Routing", "Score", "TokenBatch", "expert_route"]


def expert_route(
    logits: Tensor,
    routing: Routing,
    expert_map: Tensor,
    num_places: int,
    batch: TokenBatch,
    tile_rows: int,
    bias: Tensor | None = None,
) -> Routed:
    """See reference.py for shapes."""
    if takes(logits):
        from kernels.expert_route import kernel

        return kernel.expert_route(logits, routing, expert_map, num_places, batch, tile_rows, bias)
    return reference.expert_route(logits, routing, expert_map, num_places, batch, tile_rows, bias)
