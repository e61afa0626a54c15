"""expert_route's host kernel against its reference: every rule, ties and what is not a number."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from kernels import host as host_kernels
from kernels.expert_route import NO_SHARED, GroupScore, Routed, Routing, Score, Shared, TokenBatch, expert_route
from tests.support.routed import expert_maps

pytestmark = pytest.mark.usefixtures("poisoned_memory", "host_kernels")

ATOL = 1e-6  # float32 weights between 0 and 1
ONE_TILE = 1 << 30
PLACES = 40


def both(logits: Tensor, routing: Routing, slots: Tensor | None, tile: int, bias: Tensor | None = None,
         shared: Shared = NO_SHARED) -> Routed:  # fmt: skip
    """Compared; returns the host kernel's."""
    maps = expert_maps(logits.shape[1] + shared.num).cpu()
    maps[1, logits.shape[1] :] = PLACES - 1
    arguments = logits, routing, maps, PLACES, TokenBatch(slots, shared=shared), tile, bias
    got = expert_route(*arguments)
    with host_kernels.references_only():
        want = expert_route(*arguments)
    # torch.topk does not promise an order of choices; within a token compare them by place
    order, want_order = got.places.sort(dim=-1), want.places.sort(dim=-1)
    assert torch.equal(order.values, want_order.values)
    weights = got.weights.gather(1, order.indices), want.weights.gather(1, want_order.indices)
    torch.testing.assert_close(*weights, atol=ATOL, rtol=1e-5, equal_nan=True)
    flat, pairs = got.places.flatten(), got.pairs.long()
    real = int((flat >= 0).sum())
    assert torch.equal(pairs[:real], flat.argsort(stable=True)[len(flat) - real :])
    assert got.tiles.tolist() == want.tiles.tolist() and got.num_tiles.tolist() == [len(got.tiles)]
    assert [it.dtype for it in got[:5]] == [it.dtype for it in want[:5]] and got.tile_rows == tile
    return got


RULES = [
    *(Routing(top_k, score, renormalise, scale) for top_k, score, renormalise, scale in itertools.product(
        (1, 3, 8), Score, (False, True), (1.0, 2.5))),
    *(Routing(3, score, True, 1.0, 4, 2, group_score) for score in Score for group_score in GroupScore),
    Routing(2, Score.SOFTMAX, False, 16.0, 8, 1, GroupScore.MAX), Routing(4, Score.SIGMOID, True, 2.5, 2, 2),
]  # fmt: skip


@pytest.mark.parametrize("routing", RULES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_rule(routing: Routing, has_bias: bool) -> None:
    for tokens, tile in ((1, ONE_TILE), (0, ONE_TILE), (23, ONE_TILE), (23, 1), (23, 3)):
        logits = torch.randn(tokens, 16) * 3
        bias = torch.randn(16) if has_bias else None
        slots = torch.arange(tokens, dtype=torch.int32) % 4
        both(logits, routing, slots, tile, bias)
        both(logits, routing, None, tile, bias)
        if routing.num_groups == 1:  # whole numbers are exact in bfloat16, but sums of two may be alike
            both(logits.argsort(-1).bfloat16(), routing, slots.long(), tile, bias)


@pytest.mark.parametrize("shared", [Shared(1), Shared(2), Shared(2, True)], ids=str)
def test_shared_experts(shared: Shared) -> None:
    for routing in RULES[:8]:
        got = both(torch.randn(23, 16), routing, torch.arange(23, dtype=torch.int32) % 4, 3, shared=shared)
        assert bool((got.weights[:, routing.top_k :] == 1).all())
        assert bool((got.places[0, routing.top_k :] < 0).all()) == shared.only_own
        both(torch.randn(5, 16), routing, None, ONE_TILE, shared=shared)


def test_ties_go_to_the_expert_with_the_lower_id() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0, 1.0, 0.0, 2.0], [0.0] * 8])
    got = expert_route(logits, Routing(3), expert_maps(8).cpu(), PLACES, TokenBatch(None), ONE_TILE)
    assert got.places.tolist() == [[1, 2, 4], [0, 1, 2]]
    grouped = Routing(2, Score.SIGMOID, num_groups=4, top_groups=2, group_score=GroupScore.TOP2_SUM)
    got = expert_route(torch.zeros(1, 8), grouped, expert_maps(8).cpu(), PLACES, TokenBatch(None), ONE_TILE)
    assert got.places.tolist() == [[0, 1]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("groups", [1, 4])
def test_what_is_not_finite_shows_in_its_own_row_only(value: float, score: Score, groups: int) -> None:
    logits = torch.randn(6, 8)
    routing = Routing(3, score, num_groups=groups, top_groups=2)
    clean = expert_route(logits, routing, expert_maps(8).cpu(), PLACES, TokenBatch(None), ONE_TILE)
    logits[2, 5] = value
    got = expert_route(logits, routing, expert_maps(8).cpu(), PLACES, TokenBatch(None), ONE_TILE)
    others = torch.arange(6) != 2
    assert torch.equal(got.weights[others], clean.weights[others])
    assert torch.equal(got.places[others], clean.places[others])
    assert bool(((got.places >= 0) & (got.places < 8)).all())
    if math.isnan(value):
        assert bool(got.weights[2].isnan().any())


def test_padding_is_the_reference_s() -> None:
    batch = TokenBatch(torch.zeros(5, dtype=torch.int32), torch.tensor([3], dtype=torch.int32))
    got = expert_route(torch.randn(5, 8), Routing(2), expert_maps(8).cpu(), PLACES, batch, ONE_TILE)
    assert got.places[3:].tolist() == [[-1, -1]] * 2 and int(got.tiles[:, 2].sum()) == 6


def test_logits_of_a_view() -> None:
    wide = torch.randn(16, 9)
    both(wide.t()[:, :8], Routing(2), None, ONE_TILE)
    both(torch.randn(9, 20)[:, 3:19], Routing(2), torch.zeros(9, dtype=torch.int32), ONE_TILE)
