"""lora's reference and its host kernel against the obvious computation, on odd shapes; unwritten memory is poisoned."""

import random

import pytest
import torch

from kernels.expert_route import Routing, TokenBatch, expert_route
from kernels.expert_tiles import expert_tiles
from kernels.lora import LoraSite, LoraWeights, SiteAdapters, expert_lora, lora
from tests.support.lora_tables import attach, tiles_of
from tests.support.popularity import POPULARITIES, pick
from tests.support.routed import expert_maps

pytestmark = pytest.mark.usefixtures("poisoned_memory", "implementation")

ATOL = 1e-4  # float32 sums of up to a few hundred products of order 1, of magnitude up to 100


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 16, 16), (13, 7, 33), (100, 24, 5)])
def test_lora(popularity: str, tokens: int, width: int, inner: int) -> None:
    """A site of two slices, of which each adapter has weights for one or both."""
    ranks = {1: 1, 2: 5, 4: 8, 5: 16, 6: 64}  # slot 3 has a LoRA, but none on this linear; slot 0 is the base
    site, held = LoraSite((inner, 3)), SiteAdapters()
    for slot, rank in ranks.items():
        held.by_slot[slot] = [
            LoraWeights(torch.randn(rank, width), torch.randn(out, rank), 0.1 * slot) if slot % 3 != index else None
            for index, out in enumerate(site.widths)
        ]
    slots = sorted(pick(popularity, tokens, 7, random.Random(3)))
    attach(site, held, 7, "cpu")
    x, y = torch.randn(tokens, width), torch.randn(tokens, inner + 3)
    got = y.clone()
    lora(got, x, site, held, tiles_of(slots, 16), 64)
    for token, slot in enumerate(slots):
        expected = y[token].clone()
        for weights, part in zip(held.by_slot.get(slot, []), expected.split([inner, 3]), strict=False):
            if weights is not None:
                part += weights.scale * (weights.b @ (weights.a @ x[token]))
        torch.testing.assert_close(got[token], expected, atol=ATOL, rtol=1e-5)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("own_inputs", [True, False])
def test_gains(own_inputs: bool, has_bias: bool) -> None:
    """gain * (base + delta) + bias by slice. With inputs of their own: the value side of absorbed attention."""
    heads, depth, width, rank, scale = 3, 6, 4, 2, 0.5
    base = torch.randn(heads, width, depth)
    bias = torch.randn(heads, width) if has_bias else torch.zeros(heads, width)
    a, b = torch.randn(heads, rank, depth), torch.randn(heads, width, rank)
    gains = torch.rand(heads, width) + 0.5
    x = torch.randn(5, heads, depth)
    if not own_inputs:
        x = x[:, :1].expand(5, heads, depth)
    products = torch.einsum("hwd,thd->thw", base, x)
    y = (products + bias).flatten(1)
    held = SiteAdapters({1: [LoraWeights(*it, scale, gain) for *it, gain in zip(a, b, gains, strict=True)]})
    site = LoraSite((width,) * heads, own_inputs)
    attach(site, held, 2, "cpu")
    tiles = tiles_of([0, 0, 1, 1, 1], 2)
    lora(y, x.flatten(1) if own_inputs else x[:, 0], site, held, tiles, rank, bias.flatten() if has_bias else None)
    merged = torch.einsum("hwd,thd->thw", base + scale * b @ a, x)
    torch.testing.assert_close(y[2:], (gains * merged + bias).flatten(1)[2:], atol=ATOL, rtol=1e-5)
    assert torch.equal(y[:2], (products + bias).flatten(1)[:2])


@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize(("tokens", "num_tokens", "tile"), [(1, 1, 4), (9, 7, 2), (30, 30, 1 << 30)])
def test_expert_lora(popularity: str, tokens: int, num_tokens: int, tile: int, gathers: bool) -> None:
    """Three slices: slot 1 has all, slot 2 (rank 0) and slot 3 leave one out; 1 and 3 also replace experts."""
    experts, depth, top_k, ranks = 8, 6, 2, {1: 3, 2: 0, 3: 5}
    site, held = LoraSite((4, 4, 3), experts=experts), SiteAdapters()
    for slot, rank in ranks.items():
        a = torch.randn(experts, rank, depth)  # of the first two slices
        weights = [
            LoraWeights(it, torch.randn(experts, width, rank), 0.1 * slot)
            for it, width in zip((a, a, torch.randn(1, rank, depth).expand_as(a)), site.widths, strict=True)
        ]
        held.by_slot[slot] = [None if index == slot - 1 > 0 else it for index, it in enumerate(weights)]
    attach(site, held, 4, "cpu")
    slots = torch.tensor(sorted(pick(popularity, tokens, 4, random.Random(3))), dtype=torch.int32)
    batch = TokenBatch(slots, torch.tensor([num_tokens], dtype=torch.int32))
    routed = expert_route(torch.randn(tokens, experts), Routing(top_k), expert_maps(experts).cpu(), 24, batch, tile)
    x, y = torch.randn(tokens if gathers else tokens * top_k, depth), torch.randn(tokens * top_k, 11)
    got = y.clone()
    tiles = expert_tiles(routed, slots, experts)
    expert_lora(got, x, site, held, routed, tiles, gathers, 5, torch.empty(0, dtype=torch.int32))
    for position, pair in enumerate(routed.pairs[: num_tokens * top_k].tolist()):
        slot, place = int(slots[pair // top_k]), int(routed.places.flatten()[pair])
        row = position if gathers else pair
        expected = y[row].clone()
        for weights, part in zip(held.by_slot.get(slot, []), expected.split(site.widths), strict=False):
            if weights is not None and place < experts:
                part += weights.scale * weights.b[place] @ weights.a[place] @ x[pair // top_k if gathers else position]
        torch.testing.assert_close(got[row], expected, atol=ATOL, rtol=1e-5)
    padding = routed.places.flatten() < 0
    rows = torch.arange(len(y)) >= num_tokens * top_k if gathers else padding
    assert torch.equal(got[rows], y[rows])
