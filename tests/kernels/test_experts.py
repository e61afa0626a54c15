"""expert_route and grouped_gemm's kernels against their references."""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.expert_route import GroupScore, Routed, Routing, Score, TokenBatch
from kernels.expert_route import kernel as route_kernel
from kernels.expert_route import reference as route_reference
from kernels.grouped_gemm import Act, Activation, Layout
from kernels.grouped_gemm import kernel as gemm_kernel
from kernels.grouped_gemm import reference as gemm_reference
from kernels.lora import LoraSite, LoraWeights
from kernels.lora import kernel as lora_kernel
from kernels.lora import reference as lora_reference
from tests.kernels.test_ops import POPULARITIES, pick
from tests.support.kernel_device import DEVICE

# the interpreter's exp reports what a GPU's passes over: a sigmoid far from 0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]

ATOL = 1e-5  # float32 weights between 0 and 1, and sums of up to a few hundred products of order 1

ROUTINGS = {
    "softmax": Routing(3),
    "softmax, renormalised, scaled": Routing(2, renormalise=True, scale=1.5),
    "groups by maximum": Routing(3, num_groups=4, top_groups=2, scale=16.0),
    "sigmoid, groups by two, bias": Routing(3, Score.SIGMOID, True, 2.5, 4, 2, GroupScore.TOP2_SUM),
    "softmax of chosen": Routing(4, Score.SOFTMAX_OF_CHOSEN),
}


def counters() -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=DEVICE)


def route(logits: Tensor, routing: Routing, expert_map: Tensor, batch: TokenBatch, tile: int,
          bias: Tensor | None = None, num_slots: int = 100) -> Routed:  # fmt: skip
    """Both, compared; returns the kernel's."""
    got = route_kernel.expert_route(logits, routing, expert_map, num_slots, batch, tile, bias)
    want = route_reference.expert_route(logits, routing, expert_map, num_slots, batch, tile, bias)
    assert batch.counters is not None and not batch.counters.any()
    # torch.topk does not promise an order of choices; within a token compare them by expert
    order, want_order = got.slots.sort(dim=-1, stable=True), want.slots.sort(dim=-1, stable=True)
    assert torch.equal(order.values, want_order.values)
    real = order.values >= 0
    close = torch.isclose(got.weights.gather(1, order.indices), want.weights.gather(1, want_order.indices), atol=ATOL)
    assert bool((close | ~real).all())
    count = int(got.num_tiles)
    assert sorted(got.tiles[:count].tolist()) == sorted(want.tiles.tolist()) and count == int(want.num_tiles)
    num_real = int((got.slots >= 0).sum())
    placed = got.pairs[:num_real].long()
    assert torch.equal(got.slots.flatten()[placed], want.slots.flatten()[want.pairs[:num_real].long()])
    keys = got.slots.flatten()[placed].long() * got.pairs.numel() + placed
    assert torch.equal(keys, keys.sort().values) and len(set(placed.tolist())) == num_real
    return got


def expert_maps(experts: int) -> Tensor:
    """Four adapters: one tunes nothing, the others a few experts; slots behind the base's."""
    expert_map = torch.arange(experts, dtype=torch.int32).repeat(4, 1)
    expert_map[1, [0, 4]] = torch.tensor([experts, experts + 1], dtype=torch.int32)
    expert_map[3, [2, 4, 5]] = torch.tensor([experts + 9, experts + 10, experts + 11], dtype=torch.int32)
    return expert_map.to(DEVICE)


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
    route(logits, Routing(2), expert_maps(8), TokenBatch(slots, None, counters()), 4, num_slots=24)


@pytest.mark.parametrize("num_tokens", [0, 3, 8])
def test_padding_is_routed_nowhere(num_tokens: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(8, 8, device=DEVICE)
    logits[num_tokens:] = math.nan
    batch = TokenBatch(torch.zeros(8, dtype=torch.int32, device=DEVICE),
                       torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE), counters())  # fmt: skip
    got = route(logits, Routing(2), expert_maps(8), batch, 4)
    assert bool((got.slots[num_tokens:] == -1).all()) and bool((got.slots[:num_tokens] >= 0).all())


def test_base_only_batches_are_not_rerouted() -> None:
    logits = torch.randn(6, 8, device=DEVICE)
    wrong = torch.full((1, 8), 99, dtype=torch.int32, device=DEVICE)
    assert int(route(logits, Routing(2), wrong, TokenBatch(None, None, counters()), 4).slots.max()) < 8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_stay_inside_the_map(value: float) -> None:
    """An adapter that overflows may not make the kernel read outside, nor disturb other tokens."""
    logits = torch.randn(4, 6, device=DEVICE)
    clean = route(logits, Routing(3), expert_maps(6), TokenBatch(None, None, counters()), 4)
    logits[2] = value
    got = route_kernel.expert_route(logits, Routing(3), expert_maps(6), 20, TokenBatch(None, None, counters()), 4)
    assert bool(((got.slots >= 0) & (got.slots < 6)).all())
    others = [0, 1, 3]
    assert torch.equal(got.slots[others], clean.slots[others])
    assert torch.equal(got.weights[others], clean.weights[others])


@pytest.mark.parametrize("num_tokens", [None, 17])
def test_counting_sort(num_tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_kernel, "_QUADRATIC", 0)
    torch.manual_seed(3)
    slots = torch.tensor(pick("zipf", 37, 4, random.Random(2)), dtype=torch.int32, device=DEVICE)
    padding = None if num_tokens is None else torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # counters are left zero
        batch = TokenBatch(slots, padding, counters())
        route(torch.randn(37, 12, device=DEVICE), Routing(3), expert_maps(12), batch, 4, num_slots=70)


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


# -- grouped_gemm ---


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that the interpreter gets through, with more than one block in every direction."""
    blocks = gemm_kernel.Blocks(16, 16, 4, 2)
    monkeypatch.setattr(gemm_kernel, "_GATE_UP", {4: blocks})
    monkeypatch.setattr(gemm_kernel, "_DOWN", {4: blocks})
    monkeypatch.setattr(gemm_kernel, "_for_size", lambda blocks, _: blocks)
    monkeypatch.setattr(gemm_kernel, "_COMBINE_COLUMNS", 16)
    monkeypatch.setattr(gemm_kernel, "_ACTIVATE_COLUMNS", 16)
    monkeypatch.setattr(lora_kernel, "_blocks", lambda *_: (16, 16, 4))
    monkeypatch.setattr(lora_kernel, "_splits", lambda *_, **__: 2)


def experts_case(
    popularity: str, tokens: int, hidden: int, inner: int, layout: Layout, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, TokenBatch, Tensor]:
    """x, gate_up and down stacks, biases, batch, logits; slots that nobody uses are NaN."""
    torch.manual_seed(5)
    experts, slots = 6, 20
    x = torch.randn(tokens, hidden, device=DEVICE)
    gate_up = torch.randn(slots, 2 * inner, hidden, device=DEVICE)
    down = torch.randn(slots, hidden, inner, device=DEVICE)
    expert_map = expert_maps(experts)
    unused = [slot for slot in range(slots) if slot not in expert_map.unique().tolist()]
    gate_up[unused] = down[unused] = math.nan
    if layout.transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    biases = [torch.randn(slots, size, device=DEVICE) if has_bias else None for size in (2 * inner, hidden)]
    adapters = torch.tensor(pick(popularity, tokens, 4, random.Random(4)), dtype=torch.int32, device=DEVICE)
    batch = TokenBatch(adapters, None, counters())
    return x, gate_up, down, biases[0], biases[1], batch, torch.randn(tokens, experts, device=DEVICE)


CLAMPED = Activation(Act.CLAMPED, 1.702, 2.0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("layout", "activation", "has_bias"), [
    (Layout(), Activation(), False), (Layout(True, True), CLAMPED, True),
    (Layout(True, False), Activation(Act.GELU), True), (Layout(False, True), Activation(Act.GELU_TANH), False),
])  # fmt: skip
@pytest.mark.parametrize("by_pointers", [False, True])
def test_experts(layout: Layout, activation: Activation, has_bias: bool, by_pointers: bool) -> None:
    run_experts("uniform", 7, 40, 24, layout, activation, has_bias, by_pointers)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("tokens", [1, 13])
def test_experts_popularities(popularity: str, tokens: int) -> None:
    run_experts(popularity, tokens, 17, 9, Layout(), Activation(), False, False)


def run_experts(popularity: str, tokens: int, hidden: int, inner: int, layout: Layout, activation: Activation,
                has_bias: bool, by_pointers: bool) -> None:  # fmt: skip
    x, gate_up, down, gate_bias, down_bias, batch, logits = experts_case(
        popularity, tokens, hidden, inner, layout, has_bias
    )
    routed = route(logits, Routing(3), expert_maps(6), batch, 4)
    tables = [
        torch.tensor([matrix.data_ptr() for matrix in stack], device=DEVICE) if by_pointers else None
        for stack in (gate_up, down)
    ]
    if by_pointers:  # nothing may be found by stride
        stacks = torch.full_like(gate_up[:1], math.nan), torch.full_like(down[:1], math.nan)
    else:
        stacks = gate_up, down
    h = gemm_kernel.gate_up(x, stacks[0], routed, activation, layout, gate_bias, tables[0])
    want = gemm_reference.gate_up(x, gate_up, routed, activation, layout, gate_bias)
    torch.testing.assert_close(h, want, atol=2e-4, rtol=1e-5)
    products = gemm_kernel.gate_up(x, stacks[0], routed, None, layout, gate_bias, tables[0])
    want = gemm_reference.gate_up(x, gate_up, routed, None, layout, gate_bias)
    torch.testing.assert_close(products, want, atol=1e-4, rtol=1e-5)
    apart = gemm_kernel.activate(products, activation, layout.interleaved, routed)
    torch.testing.assert_close(apart, h, atol=1e-5, rtol=1e-5)
    want = gemm_reference.activate(products, activation, layout.interleaved, routed)
    torch.testing.assert_close(apart, want, atol=1e-5, rtol=1e-5)
    rows = gemm_kernel.down(h, stacks[1], routed, layout, down_bias, tables[1])
    torch.testing.assert_close(rows, gemm_reference.down(h, down, routed, layout, down_bias), atol=2e-3, rtol=1e-5)
    torch.testing.assert_close(
        gemm_kernel.combine(rows, routed), gemm_reference.combine(rows, routed), atol=1e-3, rtol=1e-5
    )


@pytest.mark.usefixtures("small_tiles")
def test_padding_comes_out_as_zero() -> None:
    x, gate_up, down, *_, batch, logits = experts_case("uniform", 8, 16, 8, Layout(), False)
    x[5:] = math.nan
    batch = batch._replace(num_tokens=torch.tensor([5], dtype=torch.int32, device=DEVICE))
    routed = route(logits, Routing(2), expert_maps(6), batch, 4)
    h = gemm_kernel.gate_up(x, gate_up, routed, Activation(), Layout())
    got = gemm_kernel.combine(gemm_kernel.down(h, down, routed, Layout()), routed)
    assert bool(got[:5].isfinite().all()) and not got[5:].any()
    rows = gemm_reference.gate_up(x, gate_up, routed, Activation(), Layout())
    want = gemm_reference.combine(gemm_reference.down(rows, down, routed, Layout()), routed)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("num_tokens", [0, 3, 5])
def test_activate_leaves_padding_out(num_tokens: int) -> None:
    batch = TokenBatch(None, torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE), counters())
    routed = route(torch.randn(5, 6, device=DEVICE), Routing(2), expert_maps(6), batch, 4)
    products, real = torch.randn(10, 40, device=DEVICE), num_tokens * 2
    got = gemm_kernel.activate(products, Activation(), False, routed)
    gate, up = products[:real].chunk(2, dim=-1)
    torch.testing.assert_close(got[:real], F.silu(gate) * up)
    assert bool(got[real:].isnan().all())


@pytest.mark.parametrize(
    "op", ["expert_gate_up", "expert_gate_up products", "expert_activate", "expert_down", "expert_combine"]
)
@pytest.mark.usefixtures("small_tiles")
def test_the_ops_are_registered_rightly(op: str) -> None:
    x, gate_up, down, *_, batch, logits = experts_case("uniform", 3, 16, 8, Layout(), False)
    routed = route(logits, Routing(2), expert_maps(6), batch, 4)
    indices = (routed.pairs, routed.tiles, routed.num_tiles)
    arguments = {
        "expert_gate_up": (x, gate_up, None, None, *indices, 2, 4, 0, 1.0, 0.0, False, False),
        "expert_gate_up products": (x, gate_up, None, None, *indices, 2, 4, -1, 1.0, 0.0, False, False),
        "expert_activate": (torch.randn(6, 16, device=DEVICE), routed.slots, 0, 1.0, 0.0, False),
        "expert_down": (torch.randn(6, 8, device=DEVICE), down, None, None, *indices, 4, False),
        "expert_combine": (torch.randn(6, 16, device=DEVICE), routed.weights, routed.slots),
    }[op]
    overload = getattr(torch.ops.heddle, op.split()[0]).default
    torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))


# -- LoRA inside experts ---

HIDDEN, INNER, EXPERTS = 36, 20, 6
RANKS = {1: (1, (0, 4)), 2: (5, range(EXPERTS)), 3: (16, (2, 4, 5)), 4: (0, (1,))}  # adapter: rank and experts
TUNED = 4, 3  # this adapter has a matrix of its own for this expert, and no LoRA there
ADAPTERS, MAX_RANK = 5, 16


class LoraExperts(NamedTuple):
    """gate_up [matrices, 2I, H] and down [matrices, H, I]; several slots share a matrix."""

    expert_map: Tensor
    matrix_of: list[int]
    gate_up: Tensor
    down: Tensor
    gate_up_site: LoraSite
    down_site: LoraSite

    def each_pair_alone(self, x: Tensor, routed: Routed) -> Tensor:
        """[P, H] in order of pair number, by merged matrices; 0 for padding."""
        out = x.new_zeros(routed.slots.numel(), HIDDEN)
        top_k = routed.slots.shape[1]
        for pair, slot in enumerate(routed.slots.flatten().tolist()):
            if slot >= 0:
                matrix = self.matrix_of[slot]
                gate, up = (merged(self.gate_up[matrix], self.gate_up_site, slot) @ x[pair // top_k]).chunk(2)
                out[pair] = merged(self.down[matrix], self.down_site, slot) @ (F.silu(gate) * up)
        return out


def merged(weight: Tensor, site: LoraSite, slot: int) -> Tensor:
    """W + s B A, slice by slice."""
    parts = zip(weight.split(site.widths), site.by_slot.get(slot, [None] * len(site.widths)), strict=True)
    return torch.cat([part if it is None else part + it.scale * it.b @ it.a for part, it in parts])


def lora_experts() -> LoraExperts:
    """Of the three places at most slots have two, so that every one is left out somewhere."""
    torch.manual_seed(7)
    gate_up = torch.randn(EXPERTS + 1, 2 * INNER, HIDDEN, device=DEVICE) * 0.3
    down = torch.randn(EXPERTS + 1, HIDDEN, INNER, device=DEVICE) * 0.3
    sites = LoraSite((INNER, INNER)), LoraSite((HIDDEN,))
    expert_map = torch.arange(EXPERTS, dtype=torch.int32).repeat(ADAPTERS, 1)
    matrix_of = list(range(EXPERTS))
    for adapter, (rank, experts) in RANKS.items():
        for expert in experts:
            slot = expert_map[adapter, expert] = len(matrix_of)
            matrix_of.append(expert)
            for place, (site, index, depth, width) in enumerate(
                ((sites[0], 0, HIDDEN, INNER), (sites[0], 1, HIDDEN, INNER), (sites[1], 0, INNER, HIDDEN))
            ):
                if (slot + place) % 4:
                    a, b = torch.randn(rank, depth, device=DEVICE), torch.randn(width, rank, device=DEVICE)
                    site.put(slot, index, LoraWeights(a, b, 0.05 * adapter))
    expert_map[TUNED] = len(matrix_of)
    matrix_of.append(EXPERTS)
    for site in sites:
        site.attach(torch.tensor([site.rows(slot) for slot in range(len(matrix_of))], device=DEVICE))
    return LoraExperts(expert_map.to(DEVICE), matrix_of, gate_up, down, *sites)


def by_kernels(case: LoraExperts, x: Tensor, routed: Routed, single_launch: bool) -> Tensor:
    """[P, H]. Matrices are found through pointers only."""
    ups, downs = (
        torch.tensor([stack[matrix].data_ptr() for matrix in case.matrix_of], device=DEVICE)
        for stack in (case.gate_up, case.down)
    )
    nowhere = torch.full_like(case.gate_up[:1], math.nan), torch.full_like(case.down[:1], math.nan)
    shared = torch.zeros(1 + 2 * len(routed.tiles), dtype=torch.int32, device=DEVICE)
    products = gemm_kernel.gate_up(x, nowhere[0], routed, None, Layout(), None, ups)
    lora_kernel.expert_lora(products, x, case.gate_up_site, routed, True, MAX_RANK, shared, single_launch)
    assert not shared.any()
    h = gemm_kernel.activate(products, Activation(), False, routed)
    rows = gemm_kernel.down(h, nowhere[1], routed, Layout(), None, downs)
    lora_kernel.expert_lora(rows, h, case.down_site, routed, False, MAX_RANK, shared, single_launch)
    assert not shared.any()
    return rows


def by_references(case: LoraExperts, x: Tensor, routed: Routed, single_launch: bool) -> Tensor:
    ups, downs = case.gate_up[case.matrix_of], case.down[case.matrix_of]
    products = gemm_reference.gate_up(x, ups, routed, None, Layout())
    lora_reference.expert_lora(products, x, case.gate_up_site, routed, True, MAX_RANK, None)
    h = gemm_reference.activate(products, Activation(), False, routed)
    rows = gemm_reference.down(h, downs, routed, Layout())
    lora_reference.expert_lora(rows, h, case.down_site, routed, False, MAX_RANK, None)
    return rows


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("chain", "single_launch"), [(by_kernels, True), (by_kernels, False), (by_references, True)],
                         ids=["one launch", "two launches", "references"])  # fmt: skip
@pytest.mark.parametrize(("popularity", "tokens", "num_tokens"), [
    *((popularity, 9, 7) for popularity in POPULARITIES), ("distinct", 10, 10), ("identical", 1, 1), ("uniform", 4, 0),
])  # fmt: skip
def test_lora_inside_experts(chain: Callable[..., Tensor], single_launch: bool, popularity: str, tokens: int,
                             num_tokens: int) -> None:  # fmt: skip
    """Each pair as if it were alone with the merged matrices of its slot; x of padding tokens is NaN."""
    case = lora_experts()
    adapters = pick(popularity, tokens, ADAPTERS, random.Random(6))
    batch = TokenBatch(torch.tensor(adapters, dtype=torch.int32, device=DEVICE),
                       torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE), counters())  # fmt: skip
    logits, x = torch.randn(tokens, EXPERTS, device=DEVICE), torch.randn(tokens, HIDDEN, device=DEVICE)
    routed = route(logits, Routing(3), case.expert_map, batch, 4, num_slots=len(case.matrix_of))
    x[num_tokens:] = math.nan
    rows = chain(case, x, routed, single_launch)
    want = case.each_pair_alone(x, routed)
    real = num_tokens * 3
    torch.testing.assert_close(rows[:real], want[:real], atol=1e-3, rtol=1e-5)
    assert bool(rows[real:].isnan().all())  # poisoned, and left alone
    got = (gemm_kernel if chain is by_kernels else gemm_reference).combine(rows, routed)
    weights = routed.weights.masked_fill(routed.slots < 0, 0)
    torch.testing.assert_close(got, (want.view(tokens, 3, -1) * weights[..., None]).sum(1), atol=1e-3, rtol=1e-5)


def test_mixed_ranks_are_met() -> None:
    """The case above has what it is there for."""
    case = lora_experts()
    weights = [it for adapter in case.gate_up_site.by_slot.values() for it in adapter if it is not None]
    assert {it.a.shape[0] for it in weights} == {0, 1, 5, 16}
    assert len(set(case.matrix_of)) < len(case.matrix_of)  # slots share matrices
    assert len(case.gate_up_site.by_slot) < len(case.matrix_of)  # some have no LoRA
