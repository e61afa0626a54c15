"""expert_route's kernel against its reference."""

import math
import random

import pytest
import torch

from kernels.expert_route import GroupScore, RouterLinear, Routing, Score, Shared, TokenBatch, reference
from kernels.expert_route import kernel as route_kernel
from tests.support.kernel_device import DEVICE
from tests.support.popularity import POPULARITIES, pick
from tests.support.routed import compared, counters, expert_maps, route

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
        route(torch.randn(37, 12, device=DEVICE), Routing(3), expert_maps(12), batch, 4, num_places=24)


@pytest.mark.parametrize("used", [[], [39], [2, 7, 31]], ids=str)
def test_a_counting_sort_passes_over_adapters_without_a_token(used: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """All forty have experts of their own; tokens are in any order of slot."""
    monkeypatch.setattr(route_kernel, "_QUADRATIC", 0)
    torch.manual_seed(len(used))
    experts, room, slots = 6, 3, 41
    expert_map = torch.arange(experts, dtype=torch.int32).repeat(slots, 1)
    for slot in range(1, slots):
        first = experts + (slot - 1) * room
        expert_map[slot, [0, 2, 5]] = torch.arange(first, first + room, dtype=torch.int32)
    its = random.Random(3).choices([0, *used], k=45)
    batch = TokenBatch(torch.tensor(its, dtype=torch.int32, device=DEVICE),
                       torch.tensor([40], dtype=torch.int32, device=DEVICE), counters())  # fmt: skip
    num_places = experts + (slots - 1) * room
    route(torch.randn(45, experts, device=DEVICE), Routing(2), expert_map.to(DEVICE), batch, 4, num_places=num_places)


def test_a_second_launch_finds_the_counters_zero() -> None:
    shared = counters()
    for seed in range(2):
        torch.manual_seed(seed)
        route(torch.randn(9, 8, device=DEVICE), Routing(2), expert_maps(8), TokenBatch(None, None, shared), 2)


@pytest.mark.parametrize("op", ["expert_route", "expert_route_of"])
def test_the_ops_are_registered_rightly(op: str) -> None:
    rest = (expert_maps(9), None, None, None, counters(), 40, 4, 1, False, 2, 0, False, 1.0, 1, 1, 0)
    given = (torch.randn(5, 8, device=DEVICE),)
    if op == "expert_route_of":
        given = (torch.randn(5, 24, device=DEVICE), torch.randn(8, 24, device=DEVICE), None, True)
    overload = getattr(torch.ops.heddle, op).default
    torch.library.opcheck(overload, (*given, *rest), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("only_own", [False, True])
def test_shared_experts(only_own: bool, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of ten columns of the map are experts that every token takes; adapter 1 has its own in their place."""
    if not few:
        monkeypatch.setattr(route_kernel, "_QUADRATIC", 0)
    expert_map = expert_maps(10)
    expert_map[1, 8:] = torch.tensor([12, 13], dtype=torch.int32)
    slots = torch.arange(9, dtype=torch.int32, device=DEVICE) % 3
    padding = torch.tensor([7], dtype=torch.int32, device=DEVICE)
    batch = TokenBatch(slots, padding, counters(), Shared(2, only_own))
    got = route(torch.randn(9, 8, device=DEVICE), Routing(3, renormalise=True, scale=2.0), expert_map, batch, 4)
    assert got.weights[:, 3:].tolist() == [[1.0, 1.0]] * 9
    base = [-1, -1] if only_own else [8, 9]
    assert got.places[:3, 3:].tolist() == [base, [12, 13], base]


@pytest.mark.parametrize(("tokens", "experts", "hidden"), [(1, 12, 40), (18, 12, 40), (3, 70, 100)])
@pytest.mark.parametrize("rule", ["softmax of chosen", "sigmoid, groups by two, bias"])
def test_the_router_s_product_is_a_part_of_the_launch(rule: str, tokens: int, experts: int, hidden: int) -> None:
    torch.manual_seed(tokens)
    routing = ROUTINGS[rule] if experts % 4 == 0 else Routing(4)
    linear = RouterLinear(torch.randn(experts, hidden, device=DEVICE), torch.randn(experts, device=DEVICE))
    x = torch.randn(tokens, hidden, device=DEVICE) / 4
    bias = torch.randn(experts, device=DEVICE) if routing.score is Score.SIGMOID else None
    shared = counters()
    for num_tokens in (tokens, tokens // 2):  # counters are left zero
        slots = torch.arange(tokens, dtype=torch.int32, device=DEVICE) % 3
        padding = torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
        batch = TokenBatch(slots, padding, shared, Shared(1))
        arguments = routing, expert_maps(experts + 1), 100, batch, 4, bias
        compared(route_kernel.expert_route_of(x, linear, *arguments), reference.expert_route_of(x, linear, *arguments))
        assert not shared.any()


def test_a_router_in_the_type_of_its_input() -> None:
    """Products of two numbers of bfloat16 are exact in float32, however the weight is kept."""
    torch.manual_seed(0)
    x, weight = torch.randn(5, 64, device=DEVICE).bfloat16(), torch.randn(8, 64, device=DEVICE).bfloat16()
    arguments = Routing(2), expert_maps(8), 20, TokenBatch(None, None, counters()), 4
    got = [route_kernel.expert_route_of(x, RouterLinear(its, None, as_x), *arguments)
           for its, as_x in ((weight, True), (weight.float(), True), (weight.float(), False))]  # fmt: skip
    for it in got:
        compared(it, reference.expert_route_of(x, RouterLinear(weight), *arguments))
