"""grouped_gemm's host kernels against float64: every layout and activation; unread memory is NaN."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import host as host_kernels
from kernels.expert_route import Routed, Routing, TokenBatch, expert_route
from kernels.gated import split_gate_up
from kernels.grouped_gemm import Act, Activation, Layout, activate, combine, down, gate_up
from tests.support.routed import expert_maps

pytestmark = pytest.mark.usefixtures("poisoned_memory", "host_kernels")

ATOL = 2e-4  # float32 sums of up to a few hundred products of order 1
EXPERTS, PLACES, TOP_K = 6, 20, 3
ACTIVATIONS = [Activation(), Activation(Act.GELU_TANH), Activation(Act.GELU), Activation(Act.CLAMPED, 1.702, 7.0)]
LAYOUTS = [Layout(transposed, interleaved) for transposed in (False, True) for interleaved in (False, True)]
# tokens, hidden, inner, the most rows of a tile
SHAPES = [
    (1, 16, 16, 1 << 30),
    (7, 5, 9, 1 << 30),
    (50, 33, 70, 16),
    (200, 24, 3, 1 << 30),
    (3, 1, 1, 1),
    (40, 64, 128, 3),
]


def exactly(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    match activation.act:
        case Act.SILU:
            return F.silu(gate) * up
        case Act.GELU_TANH:
            return F.gelu(gate, approximate="tanh") * up
        case Act.GELU:
            return F.gelu(gate) * up
    gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return (up + 1) * gate * torch.sigmoid(activation.alpha * gate)


def routed_by(tokens: int, tile: int, num_tokens: int | None = None) -> Routed:
    padding = None if num_tokens is None else torch.tensor([num_tokens], dtype=torch.int32)
    slots = torch.arange(tokens, dtype=torch.int32) % 4
    batch = TokenBatch(slots, padding)
    return expert_route(torch.randn(tokens, EXPERTS), Routing(TOP_K), expert_maps(EXPERTS).cpu(), PLACES, batch, tile)


def one_row(place: int) -> Routed:
    """A token with one choice."""
    places, tiles = ints([[place]]), ints([[place, 0, 1]])
    return Routed(torch.ones(1, 1), places, ints([0]), tiles, ints([1]), 1)


def ints(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def a_stack(routed: Routed, out: int, width: int, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[places, out, in], and as it is stored: with NaN between rows, and in places that nobody is routed to."""
    stack = (torch.randn(PLACES, out, width) * width**-0.5).to(dtype)
    stack[[place for place in range(PLACES) if place not in routed.places]] = math.nan
    stored = stack.mT if layout.transposed else stack
    whole = torch.full((PLACES, stored.shape[1] + 1, stored.shape[2] + 3), math.nan, dtype=dtype)
    whole[:, : stored.shape[1], : stored.shape[2]] = stored
    return stack.double(), whole[:, : stored.shape[1], : stored.shape[2]]


def close(got: Tensor, wanted: Tensor) -> None:
    rtol = 2**-8 if got.dtype == torch.bfloat16 else 1e-5  # rounded once, at the end
    torch.testing.assert_close(got.double(), wanted, atol=ATOL, rtol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda it: it.act.name)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "hidden", "inner", "tile"), SHAPES)
def test_experts(
    tokens: int, hidden: int, inner: int, tile: int, bias: bool, layout: Layout, activation: Activation,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    routed = routed_by(tokens, tile)
    ups, stored_ups = a_stack(routed, 2 * inner, hidden, layout, dtype)
    downs, stored_downs = a_stack(routed, hidden, inner, layout, dtype)
    biases = [torch.randn(PLACES, width).to(dtype) if bias else None for width in (2 * inner, hidden)]
    x = torch.full((tokens, hidden + 1), math.nan, dtype=dtype)[:, 1:].copy_(torch.randn(tokens, hidden))
    pairs = routed.pairs.long()
    places = routed.places.flatten()[pairs].long()
    # products, and that they become what the fused form gives, to the bit
    products = gate_up(x, stored_ups, routed, None, layout, biases[0])
    wanted = torch.einsum("poh,ph->po", ups[places], x.double()[pairs // TOP_K])
    wanted = wanted if biases[0] is None else wanted + biases[0].double()[places]
    assert products.dtype == torch.float32
    close(products, wanted)
    h = gate_up(x, stored_ups, routed, activation, layout, biases[0])
    assert h.dtype == dtype and torch.equal(activate(products, activation, layout.interleaved, routed, dtype), h)
    close(h, exactly(*split_gate_up(wanted, layout.interleaved), activation))
    rows = down(h, stored_downs, routed, layout, biases[1])
    wanted = torch.empty(len(pairs), hidden, dtype=torch.float64)
    wanted[pairs] = torch.einsum("poh,ph->po", downs[places], h.double())
    if biases[1] is not None:
        wanted += biases[1].double()[routed.places.flatten()]
    close(rows, wanted)
    got = combine(rows, routed)
    assert got.dtype == dtype and got.shape == (tokens, hidden)
    close(got, (rows.double().view(tokens, TOP_K, -1) * routed.weights.double()[..., None]).sum(1))


def test_padding() -> None:
    """Rows of padding are not read and not written; what combine gives for them is 0."""
    routed = routed_by(9, 4, num_tokens=6)
    _, ups = a_stack(routed, 20, 16, Layout(), torch.float32)
    _, downs = a_stack(routed, 16, 10, Layout(), torch.float32)
    x = torch.randn(9, 16)
    x[6:] = math.nan
    products = gate_up(x, ups, routed, None, Layout())
    h = activate(products, Activation(), False, routed, torch.float32)
    rows = down(h, downs, routed, Layout())
    for it in (products, h):
        assert bool(it[:18].isfinite().all()) and bool(it[18:].isnan().all())
    assert bool(rows[:18].isfinite().all()) and bool(rows[18:].isnan().all())
    got = combine(rows, routed)
    assert bool(got[:6].isfinite().all()) and not got[6:].any()


def test_a_step_of_padding_only() -> None:
    routed = routed_by(2, 4, num_tokens=0)
    _, ups = a_stack(routed, 20, 16, Layout(), torch.float32)
    assert gate_up(torch.randn(2, 16), ups, routed, Activation(), Layout()).shape == (6, 10)
    assert not combine(torch.full((6, 16), math.nan), routed).any()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bits_depend_neither_on_threads_nor_on_other_rows(layout: Layout) -> None:
    before, routed = torch.get_num_threads(), routed_by(60, 1 << 30)
    _, stack = a_stack(routed, 128, 100, layout, torch.float32)
    x, found = torch.randn(60, 100), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(gate_up(x, stack, routed, Activation(), layout))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    for position in range(0, 180, 11):
        pair = int(routed.pairs[position])
        place = int(routed.places.flatten()[pair])
        alone = one_row(place)
        got = gate_up(x[pair // TOP_K][None], stack, alone, Activation(), layout)
        assert torch.equal(got[0], found[0][position])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_is_not_finite_shows_in_its_own_rows_only(layout: Layout, value: float) -> None:
    routed = routed_by(30, 1 << 30)
    _, stack = a_stack(routed, 40, 33, layout, torch.float32)
    x = torch.randn(30, 33)
    clean = gate_up(x, stack, routed, None, layout)
    tokens, places = routed.pairs // TOP_K, routed.places.flatten()[routed.pairs.long()]
    for at, its in ((x[7], tokens == 7), (stack[int(places[0])], places == places[0])):
        kept = at.clone()
        at.fill_(value)
        got = gate_up(x, stack, routed, None, layout)
        at.copy_(kept)
        assert torch.equal(got[~its], clean[~its]) and not bool(got[its].isfinite().any())


RANGE = torch.cat([torch.linspace(-100, 100, 40001), torch.linspace(-0.5, 0.5, 4001), torch.tensor([
    0.0, -0.0, 1e-30, -1e-30, 1e-7, -1e-7, 87.0, -87.0, 87.3, -87.4, 88.0, -88.0, 89.0, -103.0, -104.0, 1e4, -1e4, 1e18,
    -1e18, 3e38, -3e38,
])])  # fmt: skip


def activated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    return activate(torch.cat([gate, up])[None], activation, False, one_row(0), torch.float32)[0]


@pytest.mark.parametrize(("activation", "rtol", "atol"), [
    # rtol: alpha times gate is rounded before it is an exponent
    # atol: where 1 + tanh or 1 + erf cancels in float32, a unit of it times half the gate
    (ACTIVATIONS[0], 1e-6, 2e-36), (ACTIVATIONS[1], 1e-6, 4e-7), (ACTIVATIONS[2], 1e-6, 4e-7),
    (Activation(Act.CLAMPED, 1.702, math.inf), 1e-5, 1e-35),
], ids=lambda it: it.act.name if isinstance(it, Activation) else "")  # fmt: skip
def test_activations_over_their_whole_range(activation: Activation, rtol: float, atol: float) -> None:
    up = torch.full_like(RANGE, 1.0 if activation.act is not Act.CLAMPED else 0.0)
    got = activated(RANGE, up, activation).double()
    wanted = exactly(RANGE.double(), up.double(), activation)
    torch.testing.assert_close(got, wanted, atol=atol, rtol=rtol)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda it: it.act.name)
def test_activations_of_what_is_not_finite(activation: Activation) -> None:
    """Something that is not finite either, where torch has that."""
    gate = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 1.0, 1.0, -1.0, 0.0])
    up = torch.tensor([1.0, 1.0, 1.0, math.nan, math.inf, -math.inf, math.inf, math.inf])
    got, wanted = activated(gate, up, activation), exactly(gate, up, activation)
    assert torch.equal(got.isfinite(), wanted.isfinite())
    torch.testing.assert_close(got[wanted.isfinite()], wanted[wanted.isfinite()], atol=0, rtol=1e-6)


@pytest.mark.parametrize("only_own", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added_beside_the_choices(dtype: torch.dtype, only_own: bool) -> None:
    """To tokens whose last choice has no place, if to some only."""
    places = torch.tensor([[1, 2, -1], [0, 1, 2], [-1, -1, -1]], dtype=torch.int32)
    routed = Routed(torch.rand(3, 3), places, ints([]), ints([]), ints([0]), 1)
    rows, beside = torch.randn(9, 21).to(dtype), torch.randn(3, 21).to(dtype)
    got = combine(rows, routed, beside, only_own)
    with host_kernels.references_only():
        want = combine(rows, routed, beside, only_own)
    torch.testing.assert_close(got, want, atol=2e-2 if dtype is torch.bfloat16 else 1e-6, rtol=1e-2)
    assert torch.equal(got[1], combine(rows, routed)[1]) == only_own
