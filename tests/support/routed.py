"""Routing by kernel and reference at once, and maps to route by: for the tests of every op on routed experts."""

from itertools import groupby
from operator import itemgetter

import torch
from torch import Tensor

from kernels.expert_route import Routed, Routing, TokenBatch, kernel, reference
from tests.support.kernel_device import DEVICE

ATOL = 1e-5  # float32 weights between 0 and 1


def counters() -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=DEVICE)


def route(logits: Tensor, routing: Routing, expert_map: Tensor, batch: TokenBatch, tile: int,
          bias: Tensor | None = None, num_places: int = 100) -> Routed:  # fmt: skip
    """Both, compared; returns the kernel's."""
    got = kernel.expert_route(logits, routing, expert_map, num_places, batch, tile, bias)
    want = reference.expert_route(logits, routing, expert_map, num_places, batch, tile, bias)
    assert batch.counters is not None and not batch.counters.any()
    return compared(got, want)


def compared(got: Routed, want: Routed) -> Routed:
    """A kernel's with a reference's; returns the kernel's."""
    # torch.topk does not promise an order of choices; within a token compare them by expert
    order, want_order = got.places.sort(dim=-1, stable=True), want.places.sort(dim=-1, stable=True)
    assert torch.equal(order.values, want_order.values)
    real = order.values >= 0
    close = torch.isclose(got.weights.gather(1, order.indices), want.weights.gather(1, want_order.indices), atol=ATOL)
    assert bool((close | ~real).all())
    count = int(got.num_tiles)
    assert sorted(got.tiles[:count].tolist()) == sorted(want.tiles.tolist()) and count == int(want.num_tiles)
    num_real = int((got.places >= 0).sum())
    assert got.num_pairs is not None and got.num_pairs.tolist() == [num_real]
    placed = got.pairs[:num_real].long()
    assert torch.equal(got.places.flatten()[placed], want.places.flatten()[want.pairs[:num_real].long()])
    keys = got.places.flatten()[placed].long() * got.pairs.numel() + placed
    assert torch.equal(keys, keys.sort().values) and len(set(placed.tolist())) == num_real
    return got


def expert_maps(experts: int) -> Tensor:
    """Four adapters: one tunes nothing, the others a few experts; places behind the base's."""
    expert_map = torch.arange(experts, dtype=torch.int32).repeat(4, 1)
    expert_map[1, [0, 4]] = torch.tensor([experts, experts + 1], dtype=torch.int32)
    expert_map[3, [2, 4, 5]] = torch.tensor([experts + 9, experts + 10, experts + 11], dtype=torch.int32)
    return expert_map.to(DEVICE)


def with_garbage(routed: Routed) -> Routed:
    """The same in another order of tiles, and with garbage behind them and behind the pairs of real tokens."""
    count, real = int(routed.num_tiles), int((routed.places >= 0).sum())
    pairs = routed.pairs.clone()
    pairs[real:] = 10**6
    behind = torch.full((3, 3), 10**6, dtype=torch.int32, device=pairs.device)
    return routed._replace(pairs=pairs, tiles=torch.cat([routed.tiles[:count].flip(0), behind]))


def cut_by_definition(routed: Routed, slots: Tensor, num_experts: int, most: int = 1 << 30) -> list[list[int]]:
    """What expert_tiles gives, row by row and sorted. most: rows after which the kernel cuts a tile anyway."""
    pairs, top_k = routed.pairs.tolist(), routed.places.shape[1]
    found = []
    for place, first, count in routed.tiles[: int(routed.num_tiles)].tolist():
        rows = [((at - first) // most, int(slots[pairs[at] // top_k]), at) for at in range(first, first + count)]
        for (_, slot), run in groupby(rows, key=itemgetter(0, 1)):
            its = [at for *_, at in run]
            if slot and place < num_experts:
                found.append([slot * num_experts + place, its[0], len(its)])
    return sorted(found)
