"""expert_tiles' kernel against its reference and its definition."""

import random

import pytest
import torch
from torch import Tensor

from kernels.expert_route import Routed, Routing, TokenBatch
from kernels.expert_route.reference import expert_route
from kernels.expert_tiles import kernel, reference
from tests.support.breadth import always
from tests.support.kernel_device import DEVICE
from tests.support.popularity import POPULARITIES, pick
from tests.support.routed import cut_by_definition, with_garbage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]

EXPERTS = 10


def routed_by(slots: Tensor, adapters: int, top_k: int, tile: int, num_tokens: int | None) -> Routed:
    """Every other adapter replaces two experts."""
    torch.manual_seed(0)
    expert_map = torch.arange(EXPERTS, dtype=torch.int32, device=DEVICE).repeat(adapters, 1)
    for slot in range(1, adapters, 2):
        expert_map[slot, [slot % 4, 7]] = torch.arange(2, dtype=torch.int32, device=DEVICE) + EXPERTS + 2 * (slot - 1)
    padding = None if num_tokens is None else torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
    logits, num_places = torch.randn(len(slots), EXPERTS, device=DEVICE), EXPERTS + 2 * adapters
    return with_garbage(expert_route(logits, Routing(top_k), expert_map, num_places, TokenBatch(slots, padding), tile))


def check(adapters_of: list[int], top_k: int, tile: int, num_tokens: int | None = None) -> None:
    slots = torch.tensor(adapters_of, dtype=torch.int32, device=DEVICE)
    routed = routed_by(slots, max(adapters_of) + 1, top_k, tile, num_tokens)
    if num_tokens is not None:
        slots[num_tokens:] = 10**6  # of padding nothing is looked at
    got, want = kernel.expert_tiles(routed, slots, EXPERTS), reference.expert_tiles(routed, slots, EXPERTS)
    count = int(got.num_tiles)
    assert got.tiles.shape == (len(slots) * top_k, 3) and got.tile_rows == min(tile, 64)
    assert tile > 64 or sorted(got.tiles[:count].tolist()) == sorted(want.tiles.tolist())
    assert sorted(got.tiles[:count].tolist()) == cut_by_definition(routed, slots, EXPERTS, 64)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("popularity", always(POPULARITIES, "zipf", "distinct"))
@pytest.mark.parametrize(("tokens", "top_k", "tile"), [(1, 6, 16), (13, 3, 2), (29, 2, 4), (45, 5, 16)])
def test_expert_tiles(popularity: str, tokens: int, top_k: int, tile: int, ordered: bool) -> None:
    slots = pick(popularity, tokens, 5, random.Random(tokens))
    check(sorted(slots) if ordered else slots, top_k, tile)


@pytest.mark.parametrize(("tile", "top_k"), [(1, 3), (32, 3), (64, 3), (128, 8)])
def test_tiles_of_other_sizes(tile: int, top_k: int) -> None:
    check(sorted(pick("uniform", 150, 4, random.Random(0))), top_k, tile)


def test_every_token_has_an_adapter_of_its_own() -> None:
    check(list(range(1, 24)), 4, 16)


@pytest.mark.parametrize("slots", [[0], [3], [0] * 7], ids=str)
def test_small_batches(slots: list[int]) -> None:
    check(slots, 2, 4)


@pytest.mark.parametrize("num_tokens", [0, 1, 6])
def test_padding_is_in_no_tile(num_tokens: int) -> None:
    check([0, 1, 1, 2, 2, 2, 3, 3, 3], 3, 4, num_tokens)


def test_the_op_is_registered_rightly() -> None:
    slots = torch.tensor([0, 1, 1], dtype=torch.int32, device=DEVICE)
    routed = routed_by(slots, 2, 2, 4, None)
    arguments = (routed.pairs, routed.tiles, routed.num_tiles, slots, EXPERTS, 2, 4)
    op = torch.ops.heddle.expert_tiles.default
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
