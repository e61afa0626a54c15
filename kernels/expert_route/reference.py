"""Reference of expert_route: ExpertWeave's batched rerouting (arXiv 2508.17624, section 4.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.expert_route.routing import GroupScore, Routed, RouterLinear, Routing, Score, TokenBatch

_NO_PLACE = torch.iinfo(torch.int32).max


def expert_route(
    logits: Tensor,
    routing: Routing,
    expert_map: Tensor,
    num_places: int,
    batch: TokenBatch,
    tile_rows: int,
    bias: Tensor | None = None,
) -> Routed:
    """Choose each token's experts, replace them by the places that its adapter has for them, and sort by place.

    logits [T, M]: the router's, over the base's M experts. Rerouting changes places and leaves weights alone.
    expert_map [adapters + 1, M] int32: the place of each expert for each adapter; row 0, the base's, is the identity.
        Behind the M there may be shared experts (see Shared), which have places like the others.
    num_places: how many the expert stack has; every place in the map is below it. tile_rows: the most rows of a tile.
    bias [M]: added to the scores when experts are ranked, not to their weights (DeepSeek-V3).
    """
    weights, ids = choose(logits.float(), routing, bias)
    base_places = logits.shape[1] + batch.shared.num
    if batch.shared.num:
        always = torch.arange(logits.shape[1], base_places, device=ids.device).expand(len(ids), -1)
        weights, ids = (
            torch.cat([weights, torch.ones_like(always, dtype=weights.dtype)], 1),
            torch.cat([ids, always], 1),
        )
    if batch.slots is not None:
        places = expert_map[batch.slots[:, None], ids].int()
    else:
        places = ids.int()
    if batch.shared.only_own:
        its = places[:, routing.top_k :]
        its.masked_fill_(its < base_places, -1)
    if batch.num_tokens is not None:
        places[torch.arange(len(places), device=places.device) >= batch.num_tokens] = -1
    flat = places.flatten()
    pairs = torch.where(flat < 0, _NO_PLACE, flat).argsort(stable=True).int()
    real = flat[pairs[: int((flat >= 0).sum())]]
    used, counts = torch.unique_consecutive(real, return_counts=True)
    num_pairs = torch.tensor([len(real)], dtype=torch.int32, device=places.device)
    return Routed(weights, places, pairs, *_tiles(used, counts, tile_rows), tile_rows, num_pairs)


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
    """The same from x [T, H], of which the router makes its logits."""
    logits = F.linear(x.float(), router.weight.float(), None if router.bias is None else router.bias.float())
    return expert_route(logits, routing, expert_map, num_places, batch, tile_rows, bias)


def choose(logits: Tensor, routing: Routing, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """weights [T, K] float32 and expert ids [T, K] int64; logits [T, M] float32."""
    match routing.score:
        case Score.SOFTMAX:
            scores = logits.softmax(-1)
        case Score.SIGMOID:
            scores = logits.sigmoid()
        case Score.SOFTMAX_OF_CHOSEN | Score.GIVEN:
            scores = logits
    ranked = scores if bias is None else scores + bias
    if routing.num_groups > 1:
        ranked = _limit_to_groups(ranked, routing)
    ids = ranked.topk(routing.top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if routing.score is Score.SOFTMAX_OF_CHOSEN:
        weights = weights.softmax(-1)
    elif routing.renormalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routing.scale, ids


def _limit_to_groups(ranked: Tensor, routing: Routing) -> Tensor:
    groups = ranked.unflatten(-1, (routing.num_groups, -1))
    best = groups.topk(2, dim=-1).values.sum(-1) if routing.group_score is GroupScore.TOP2_SUM else groups.amax(-1)
    chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(routing.top_groups, dim=-1).indices, True)
    return groups.masked_fill(~chosen[..., None], float("-inf")).flatten(-2)


def _tiles(used: Tensor, counts: Tensor, tile_rows: int) -> tuple[Tensor, Tensor]:
    """Cut each place's pairs into tiles: [n, 3] int32, and n as a tensor."""
    starts = counts.cumsum(0) - counts
    if len(counts) == 0 or tile_rows >= int(counts.max()):  # the CPU's: a place is one tile
        tiles = torch.stack([used, starts, counts], dim=-1)
    else:
        per_place = -(-counts // tile_rows)
        place_of = torch.arange(len(used), device=used.device).repeat_interleave(per_place)
        within = torch.arange(len(place_of), device=used.device) - (per_place.cumsum(0) - per_place)[place_of]
        rows = (counts[place_of] - within * tile_rows).clamp(max=tile_rows)
        tiles = torch.stack([used[place_of], starts[place_of] + within * tile_rows, rows], dim=-1)
    return tiles.int(), torch.tensor([len(tiles)], dtype=torch.int32, device=used.device)
