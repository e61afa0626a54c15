"""expert_tiles' reference against its definition, with unwritten memory poisoned."""

import random

import pytest
import torch

from kernels.expert_route import Routed, Routing, TokenBatch, expert_route
from kernels.expert_tiles import expert_tiles
from tests.support.popularity import POPULARITIES, pick
from tests.support.routed import cut_by_definition, expert_maps

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EXPERTS, PLACES = 8, 24


def routed_by(slots: list[int], tile: int, num_tokens: int | None = None) -> Routed:
    torch.manual_seed(0)
    padding = None if num_tokens is None else torch.tensor([num_tokens], dtype=torch.int32)
    batch = TokenBatch(torch.tensor(slots, dtype=torch.int32), padding)
    logits = torch.randn(len(slots), EXPERTS)
    return expert_route(logits, Routing(3), expert_maps(EXPERTS).cpu(), PLACES, batch, tile)


def check(slots: list[int], tile: int, num_tokens: int | None = None) -> None:
    routed, on_device = routed_by(slots, tile, num_tokens), torch.tensor(slots, dtype=torch.int32)
    if num_tokens is not None:
        on_device[num_tokens:] = 10**6  # of padding nothing is looked at
    got = expert_tiles(routed, on_device, EXPERTS)
    assert sorted(got.tiles[: int(got.num_tiles)].tolist()) == cut_by_definition(routed, on_device, EXPERTS)
    assert got.tile_rows == tile and got.tiles.dtype == got.num_tiles.dtype == torch.int32


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize(("tokens", "tile"), [(1, 16), (13, 1), (13, 3), (40, 8), (40, 1 << 30)])
def test_expert_tiles(popularity: str, tokens: int, tile: int, ordered: bool) -> None:
    slots = pick(popularity, tokens, 4, random.Random(3))
    check(sorted(slots) if ordered else slots, tile)


@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_padding_is_in_no_tile(num_tokens: int) -> None:
    check([0, 1, 1, 2, 2, 3, 3, 3, 3], 4, num_tokens)


def test_a_batch_of_the_base_has_no_tiles() -> None:
    assert int(expert_tiles(routed_by([0] * 5, 4), torch.zeros(5, dtype=torch.int32), EXPERTS).num_tiles) == 0


def test_every_row_of_an_adapter_at_the_bases_experts_is_in_one_tile() -> None:
    """What the rows are cut for, whatever the cut: one slot, one expert, no row twice, none left out."""
    slots = torch.tensor(sorted(pick("uniform", 40, 4, random.Random(1))), dtype=torch.int32)
    routed = routed_by(slots.tolist(), 4)
    places, seen = routed.places.flatten(), []
    for entry, first, count in expert_tiles(routed, slots, EXPERTS).tiles.tolist():
        pairs = routed.pairs[first : first + count].long()
        seen += pairs.tolist()
        assert count <= 4 and set(places[pairs].tolist()) == {entry % EXPERTS}
        assert set(slots[pairs // 3].tolist()) == {entry // EXPERTS} and entry >= EXPERTS
    wanted = (places < EXPERTS) & (slots.repeat_interleave(3) > 0)
    assert sorted(seen) == wanted.nonzero().flatten().tolist()
    assert bool((places >= EXPERTS).any())  # the case has places of adapters' own
