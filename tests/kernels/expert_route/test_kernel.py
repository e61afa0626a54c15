"""expert_route's kernel against its reference."""

import math
import random

import pytest
import torch

from kernels.expert_route import GroupScore, Routing, Score, TokenBatch
from kernels.expert_route import kernel as route_kernel
from tests.support.kernel_device import DEVICE
from tests.support.popularity import POPULARITIES, pick
from tests.support.routed import counters, expert_maps, route

# the interpreter's exp reports what a GPU's passes over: a sigmoid far from 0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]

ROUTINGS = {
    "softmax": Routing(3),
    "softmax, renormalised, scaled": Routing(2, renormalise=True, scale=1.5),
    "groups by maximum": Routing(3, num_groups=4, top_groups=2, scale=16.0),
    "sigmoid, groups by two, bias": Routing(3, Score.SIGMOID, True, 2.5, 4, 2, GroupScore.TOP2_SUM),
    "softmax of chosen": Routing(4, Score.SOFTMAX_OF_CHOSEN),
}


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize(("tokens", "tile"), [(1, 16), (5, 2), (21, 4)])
def test_route(routing: Routing, tokens: int, tile: int) -> None:
    torch.manual_seed(tokens)
    rng = random.Random(0)
    experts = 12
    logits = torch.randn(tokens, experts, device=DEVICE) * 2
    slots = torch.tensor(pick("uniform", tokens, 4, rng), dtype=torch.int32, device=DEVICE)
    bias = torch.randn(experts, device=DEVICE) if routing.score is Score.SIGMOID else None
    route(logits, routing, expert_maps(experts), TokenBatch(slots, None, counters()), tile, bias=bias)


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_route_popularities(popularity: str) -> None:
    torch.manual_seed(0)
    slots = torch.tensor(pick(popularity, 19, 4, random.Random(1)), dtype=torch.int32, device=DEVICE)
    logits = torch.randn(19, 8, device=DEVICE)
    if popularity == "identical":
        logits = logits[:1].repeat(19, 1)  # all tokens choose the same experts
    route(logits, Routing(2), expert_maps(8), TokenBatch(slots, None, counters()), 4, num_places=24)


@pytest.mark.parametrize("num_tokens", [0, 3, 8])
def test_padding_is_routed_nowhere(num_tokens: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, 8, device=DEVICE)
    logits[num_tokens:] = math.nan
    batch = TokenBatch(torch.zeros(8, dtype=torch.int32, device=DEVICE),
                       torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE), counters())  # fmt: skip
    got = route(logits, Routing(2), expert_maps(8), batch, 4)
    assert bool((got.places[num_tokens:] == -1).all()) and bool((got.places[:num_tokens] >= 0).all())


def test_base_only_batches_are_not_rerouted() -> None:
    logits = torch.randn(6, 8, device=DEVICE)
    wrong = torch.full((1, 8), 99, dtype=torch.int32, device=DEVICE)
    assert int(route(logits, Routing(2), wrong, TokenBatch(None, None, counters()), 4).places.max()) < 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_stay_inside_the_map(value: float) -> None:
    """An adapter that overflows may not make the kernel read outside, nor disturb other tokens."""
    logits = torch.randn(4, 6, device=DEVICE)
    clean = route(logits, Routing(3), expert_maps(6), TokenBatch(None, None, counters()), 4)
    logits[2] = value
    got = route_kernel.expert_route(logits, Routing(3), expert_maps(6), 20, TokenBatch(None, None, counters()), 4)
    assert bool(((got.places >= 0) & (got.places < 6)).all())
    others = [0, 1, 3]
    assert torch.equal(got.places[others], clean.places[others])
    assert torch.equal(got.weights[others], clean.weights[others])


@pytest.mark.parametrize("num_tokens", [None, 17])
def test_counting_sort(num_tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_kernel, "_QUADRATIC", 0)
    torch.manual_seed(3)
    slots = torch.tensor(pick("zipf", 37, 4, random.Random(2)), dtype=torch.int32, device=DEVICE)
    padding = None if num_tokens is None else torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # counters are left zero
        batch = TokenBatch(slots, padding, counters())
        route(torch.randn(37, 12, device=DEVICE), Routing(3), expert_maps(12), batch, 4, num_places=70)


def test_a_second_launch_finds_the_counters_zero() -> None:
    shared = counters()
    for seed in range(2):
        torch.manual_seed(seed)
        route(torch.randn(9, 8, device=DEVICE), Routing(2), expert_maps(8), TokenBatch(None, None, shared), 2)


def test_the_op_is_registered_rightly() -> None:
    arguments = (
        torch.randn(5, 8, device=DEVICE),
        expert_maps(8),
        None,
        None,
        None,
        counters(),
        20,
        4,
        2,
        0,
        False,
        1.0,
        1,
        1,
        0,
    )
    torch.library.opcheck(
        torch.ops.heddle.expert_route.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
