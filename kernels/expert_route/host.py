"""Calls expert_route's host kernel (host.cpp)."""

import ctypes
from ctypes import byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from kernels.expert_route.routing import Routed, Routing, TokenBatch, max_tiles
from kernels.host import library


class _Route(ctypes.Structure):
    """Route in host.cpp, field by field."""

    _fields_ = [
        *((name, c_void_p) for name in (
            "logits", "bias", "expert_map", "slots", "weights", "places", "pairs", "tiles", "num_tiles",
        )),
        *((name, c_int64) for name in (
            "tokens", "experts", "choices", "shared", "only_own", "map_step", "num_places", "tile_rows", "score",
            "renormalise", "groups", "top_groups", "group_score",
        )),
        ("scale", c_float),
    ]  # fmt: skip


def expert_route(
    logits: Tensor,
    routing: Routing,
    expert_map: Tensor,
    num_places: int,
    batch: TokenBatch,
    tile_rows: int,
    bias: Tensor | None = None,
) -> Routed:
    """As the reference, where no token is padding. Ties go to the expert with the lower id."""
    assert batch.num_tokens is None
    logits = logits.float().contiguous()
    expert_map = expert_map.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    slots = None if batch.slots is None else batch.slots.int().contiguous()
    (tokens, experts), shared = logits.shape, batch.shared
    choices = routing.top_k + shared.num
    weights = logits.new_empty(tokens, choices)
    count = tokens * choices
    most = max_tiles(count, num_places, tile_rows)
    places, pairs, rest = torch.empty(2 * count + 1 + 3 * most, dtype=torch.int32).split([count, count, 1 + 3 * most])
    num_tiles, tiles = rest[:1], rest[1:].view(-1, 3)
    it = _Route(
        logits.data_ptr(), None if bias is None else bias.data_ptr(), expert_map.data_ptr(),
        None if slots is None else slots.data_ptr(), weights.data_ptr(), places.data_ptr(), pairs.data_ptr(),
        tiles.data_ptr(), num_tiles.data_ptr(), tokens, experts, choices, shared.num, shared.only_own,
        expert_map.shape[1], num_places, tile_rows, routing.score, routing.renormalise, routing.num_groups,
        routing.top_groups, routing.group_score, routing.scale,
    )  # fmt: skip
    library().heddle_expert_route(byref(it))
    return Routed(weights, places.view(tokens, choices), pairs, tiles[: int(num_tiles)], num_tiles, tile_rows)
