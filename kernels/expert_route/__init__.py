"""expert_route: choose each token's experts, reroute them through its adapter's expert map, sort them by expert place.

A layer of experts is a stack of matrices. An expert place is a row of that stack: the base's experts come first, those
that adapters bring behind them. For a token t with the adapter in slots[t] (0: the base), and each of its K choices:

    scores      = softmax(logits[t])              or another rule, see Routing
    ids         = the K experts with the best scores, and weights their scores
    places[t]   = expert_map[slots[t], ids]       the adapter's own expert where it has one, else the base's

The (token, choice) pairs, numbered t * K + choice, are then put in order of place and cut into tiles of at most
`tile_rows` pairs of one place: what a grouped product reads. ("Position" is an index into that order.)

Running example: 4 experts, 2 choices a token with weights that sum to 1, tiles of at most 1 row. Token 0 has the
adapter in slot 1, which replaces expert 1 by what lies in place 7; token 1 has none.

    expert_map  [[0, 1, 2, 3], [0, 7, 2, 3]]
    slots       [1, 0]
    ids         [[1, 3], [3, 0]]
    places      [[7, 3], [3, 0]]
    weights     [[.6, .4], [.7, .3]]
    pairs       [3, 1, 2, 0]                                   in order of place, and of number within a place
    tiles       [[0, 0, 1], [3, 1, 1], [3, 2, 1], [7, 3, 1]]   place, first position, rows; in any order
    num_tiles   [4]

Shared experts, which every token takes, are choices too: with n of them the map has M + n columns, and each token n
more choices, of weight 1.

Where there are few tokens, the router's product is a part of the same launch (expert_route_of).

Source: ExpertWeave's batched rerouting (arXiv 2508.17624, section 4.3).
"""

from torch import Tensor

from kernels.compiled import takes
from kernels.expert_route import host, reference
from kernels.expert_route.routing import (
    NO_SHARED,
    GroupScore,
    Routed,
    RouterLinear,
    Routing,
    Score,
    Shared,
    TokenBatch,
)
from kernels.host import takes as host_takes

__all__ = ["NO_SHARED", "GroupScore", "Routed", "RouterLinear", "Routing", "Score", "Shared", "TokenBatch",
           "expert_route", "expert_route_of", "multiplies"]  # fmt: skip


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
    if host_takes(logits) and batch.num_tokens is None:  # the host does not pad its steps
        return host.expert_route(logits, routing, expert_map, num_places, batch, tile_rows, bias)
    return reference.expert_route(logits, routing, expert_map, num_places, batch, tile_rows, bias)


def multiplies(x: Tensor, choices: int) -> bool:
    """Whether the router's product of x [T, H] is a part of the launch, where a token takes so many experts, the shared
    ones included."""
    if not takes(x):
        return False
    from kernels.expert_route import kernel

    return kernel.are_few(len(x) * choices)


def expert_route_of(
    x: Tensor,
    router: RouterLinear,
    routing: Routing,
    expert_map: Tensor,
    num_places: int,
    batch: TokenBatch,
    tile_rows: int,
    bias: Tensor | None = None,
) -> Routed:
    """See reference.py for shapes."""
    if multiplies(x, routing.top_k + batch.shared.num):
        from kernels.expert_route import kernel

        return kernel.expert_route_of(x, router, routing, expert_map, num_places, batch, tile_rows, bias)
    return reference.expert_route_of(x, router, routing, expert_map, num_places, batch, tile_rows, bias)
