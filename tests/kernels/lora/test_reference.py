"""lora's reference against the obvious computation, on odd shapes, with unwritten memory poisoned."""

import random

import pytest
import torch

from kernels.adapter_rows import AdapterTiles, Segment
from kernels.lora import LoraSite, LoraWeights, SiteAdapters, lora
from tests.support.popularity import POPULARITIES, pick

pytestmark = pytest.mark.usefixtures("poisoned_memory")

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
    spans = [
        Segment(slots.index(slot), len(slots) - slots[::-1].index(slot), slot) for slot in sorted(set(slots)) if slot
    ]
    x, y = torch.randn(tokens, width), torch.randn(tokens, inner + 3)
    got = y.clone()
    lora(got, x, site, held, AdapterTiles(spans), 64)
    for token, slot in enumerate(slots):
        expected = y[token].clone()
        for weights, part in zip(held.by_slot.get(slot, []), expected.split([inner, 3]), strict=False):
            if weights is not None:
                part += weights.scale * (weights.b @ (weights.a @ x[token]))
        torch.testing.assert_close(got[token], expected, atol=ATOL, rtol=1e-5)
