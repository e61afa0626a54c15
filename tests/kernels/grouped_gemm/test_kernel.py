"""grouped_gemm's kernels against their references."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.expert_route import Routing, Shared, TokenBatch
from kernels.grouped_gemm import Act, Activation, Layout
from kernels.grouped_gemm import kernel as gemm_kernel
from kernels.grouped_gemm import reference as gemm_reference
from tests.support.breadth import always
from tests.support.kernel_device import DEVICE
from tests.support.popularity import POPULARITIES, pick
from tests.support.routed import counters, expert_maps, route

# the interpreter's exp reports what a GPU's passes over: a sigmoid far from 0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]


def experts_case(
    popularity: str, tokens: int, hidden: int, inner: int, layout: Layout, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, TokenBatch, Tensor]:
    """x, gate_up and down stacks, biases, batch, logits; places that nobody uses are NaN."""
    torch.manual_seed(5)
    experts, places = 6, 20
    x = torch.randn(tokens, hidden, device=DEVICE)
    gate_up = torch.randn(places, 2 * inner, hidden, device=DEVICE)
    down = torch.randn(places, hidden, inner, device=DEVICE)
    expert_map = expert_maps(experts)
    unused = [place for place in range(places) if place not in expert_map.unique().tolist()]
    gate_up[unused] = down[unused] = math.nan
    if layout.transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    biases = [torch.randn(places, size, device=DEVICE) if has_bias else None for size in (2 * inner, hidden)]
    adapters = torch.tensor(pick(popularity, tokens, 4, random.Random(4)), dtype=torch.int32, device=DEVICE)
    batch = TokenBatch(adapters, None, counters())
    return x, gate_up, down, biases[0], biases[1], batch, torch.randn(tokens, experts, device=DEVICE)


CLAMPED = Activation(Act.CLAMPED, 1.702, 2.0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("layout", "activation", "has_bias"), [
    (Layout(), Activation(), False), (Layout(True, True), CLAMPED, True),
    (Layout(True, False), Activation(Act.GELU), True), (Layout(False, True), Activation(Act.GELU_TANH), False),
])  # fmt: skip
def test_experts(layout: Layout, activation: Activation, has_bias: bool) -> None:
    run_experts("uniform", 7, 40, 24, layout, activation, has_bias)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("popularity", always(POPULARITIES, "zipf"))
@pytest.mark.parametrize("tokens", [1, 13])
def test_experts_popularities(popularity: str, tokens: int) -> None:
    run_experts(popularity, tokens, 17, 9, Layout(), Activation(), False)


def run_experts(popularity: str, tokens: int, hidden: int, inner: int, layout: Layout, activation: Activation,
                has_bias: bool) -> None:  # fmt: skip
    x, gate_up, down, gate_bias, down_bias, batch, logits = experts_case(
        popularity, tokens, hidden, inner, layout, has_bias
    )
    routed = route(logits, Routing(3), expert_maps(6), batch, 4)
    h = gemm_kernel.gate_up(x, gate_up, routed, activation, layout, gate_bias)
    want = gemm_reference.gate_up(x, gate_up, routed, activation, layout, gate_bias)
    torch.testing.assert_close(h, want, atol=2e-4, rtol=1e-5)
    products = gemm_kernel.gate_up(x, gate_up, routed, None, layout, gate_bias)
    want = gemm_reference.gate_up(x, gate_up, routed, None, layout, gate_bias)
    torch.testing.assert_close(products, want, atol=1e-4, rtol=1e-5)
    apart = gemm_kernel.activate(products, activation, layout.interleaved, routed, x.dtype)
    torch.testing.assert_close(apart, h, atol=1e-5, rtol=1e-5)
    want = gemm_reference.activate(products, activation, layout.interleaved, routed, x.dtype)
    torch.testing.assert_close(apart, want, atol=1e-5, rtol=1e-5)
    rows = gemm_kernel.down(h, down, routed, layout, down_bias)
    torch.testing.assert_close(rows, gemm_reference.down(h, down, routed, layout, down_bias), atol=2e-3, rtol=1e-5)
    torch.testing.assert_close(
        gemm_kernel.combine(rows, routed), gemm_reference.combine(rows, routed), atol=1e-3, rtol=1e-5
    )


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", always([torch.bfloat16, torch.float16], torch.bfloat16))
@pytest.mark.parametrize(("layout", "activation", "has_bias"), [
    (Layout(), Activation(), False), (Layout(True, True), CLAMPED, True), (Layout(), Activation(Act.GELU), True),
    (Layout(False, True), Activation(Act.GELU_TANH), False),
])  # fmt: skip
def test_an_activation_of_its_own_gives_the_same_bits(
    dtype: torch.dtype, layout: Layout, activation: Activation, has_bias: bool
) -> None:
    """So in this product, at one height of tiles, a row does not feel whether something was added to others."""
    x, stack, _, bias, _, batch, logits = experts_case("uniform", 7, 100, 24, layout, has_bias)
    x, stack, bias = x.to(dtype), stack.to(dtype), None if bias is None else bias.to(dtype)
    routed = route(logits, Routing(3), expert_maps(6), batch, 4)
    outcomes = []
    for ops, kept in ((gemm_kernel, torch.float32), (gemm_reference, dtype)):
        fused = ops.gate_up(x, stack, routed, activation, layout, bias)
        products = ops.gate_up(x, stack, routed, None, layout, bias)
        assert (fused.dtype, products.dtype) == (dtype, kept)
        assert torch.equal(ops.activate(products, activation, layout.interleaved, routed, dtype), fused)
        outcomes.append(products)
    # only the reference rounds, before a bias and after it
    atol = torch.finfo(dtype).eps * float(outcomes[0].abs().max())
    torch.testing.assert_close(*outcomes, atol=atol, rtol=0, check_dtype=False)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("products_dtype", [torch.float32, None])
@pytest.mark.parametrize("interleaved", [False, True])
def test_activate_reads_either_type(dtype: torch.dtype, products_dtype: torch.dtype | None, interleaved: bool) -> None:
    """products_dtype None: the same as what it returns."""
    routed = route(torch.randn(5, 6, device=DEVICE), Routing(2), expert_maps(6), TokenBatch(None, None, counters()), 4)
    products = torch.randn(10, 40, device=DEVICE).to(products_dtype or dtype)
    got = gemm_kernel.activate(products, CLAMPED, interleaved, routed, dtype)
    want = gemm_reference.activate(products, CLAMPED, interleaved, routed, dtype)
    exact = gemm_reference.activate(products.float(), CLAMPED, interleaved, routed, torch.float32)
    assert got.dtype == want.dtype == dtype
    unit = torch.finfo(dtype).eps  # the kernel rounds once, the reference after each of its steps
    torch.testing.assert_close(got.float(), exact, atol=unit, rtol=unit)
    torch.testing.assert_close(want.float(), exact, atol=4 * unit, rtol=4 * unit)


@pytest.mark.parametrize("by_tma", [False, True])
def test_tall_tiles(by_tma: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 128 rows, in groups of which the last is not full; weights by pointers or by descriptors."""
    sizes = {"": {(2, 128): gemm_kernel.Blocks(16, 16, 8, 2, group=5, by_tma=by_tma)}}
    monkeypatch.setattr(gemm_kernel, "GATE_UP", sizes)
    monkeypatch.setattr(gemm_kernel, "DOWN", sizes)
    x, up, down, *_, batch, logits = experts_case("zipf", 140, 40, 24, Layout(), False)
    logits[:, 1] += 9  # who is chosen by all has two tiles
    routed = route(logits, Routing(2), expert_maps(6), batch, 128)
    assert int(routed.num_tiles) % 5
    x, up, down = x.bfloat16(), up.bfloat16(), down.bfloat16()
    unit = torch.finfo(torch.bfloat16).eps
    h = gemm_kernel.gate_up(x, up, routed, Activation(), Layout())
    want = gemm_reference.gate_up(x.float(), up.float(), routed, Activation(), Layout())
    torch.testing.assert_close(h.float(), want, atol=unit, rtol=unit)
    rows = gemm_kernel.down(h, down, routed, Layout())
    want = gemm_reference.down(h.float(), down.float(), routed, Layout())
    torch.testing.assert_close(rows.float(), want, atol=unit, rtol=unit)


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
@pytest.mark.parametrize("activation", [None, Activation()])
def test_shared_experts_of_adapters_only(activation: Activation | None) -> None:
    """Pairs without a place among those that have one; the base's shared experts are added beside."""
    x, gate_up, down, *_, batch, logits = experts_case("uniform", 7, 16, 8, Layout(), False)
    batch = batch._replace(shared=Shared(1, only_own=True))
    expert_map, beside = expert_maps(6), torch.randn(7, 16, device=DEVICE)
    expert_map = torch.cat([expert_map, torch.full_like(expert_map[:, :1], 6)], dim=1)
    expert_map[1, 6], expert_map[3, 6] = 7, 15  # two more that there are
    routed, outs = route(logits, Routing(2), expert_map, batch, 4), []
    assert 0 < int((routed.places[:, -1] < 0).sum()) < 7
    for it in (gemm_kernel, gemm_reference):
        h = it.gate_up(x, gate_up, routed, activation, Layout())
        if activation is None:
            h = it.activate(h, Activation(), False, routed, x.dtype)
        outs.append(it.combine(it.down(h, down, routed, Layout()), routed, beside, True))
    torch.testing.assert_close(*outs, atol=1e-3, rtol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("num_tokens", [0, 3, 5])
def test_activate_leaves_padding_out(num_tokens: int) -> None:
    batch = TokenBatch(None, torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE), counters())
    routed = route(torch.randn(5, 6, device=DEVICE), Routing(2), expert_maps(6), batch, 4)
    products, real = torch.randn(10, 40, device=DEVICE), num_tokens * 2
    got = gemm_kernel.activate(products, Activation(), False, routed, torch.float32)
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
        "expert_gate_up": (x, gate_up, None, *indices, 2, 4, 0, 1.0, 0.0, False, False),
        "expert_gate_up products": (x, gate_up, None, *indices, 2, 4, -1, 1.0, 0.0, False, False),
        "expert_activate": (torch.randn(6, 16, device=DEVICE), routed.num_pairs, 0, 1.0, 0.0, False, torch.bfloat16),
        "expert_down": (torch.randn(6, 8, device=DEVICE), down, None, *indices, 4, False),
        "expert_combine": (torch.randn(6, 16, device=DEVICE), routed.weights, routed.places),
    }[op]
    overload = getattr(torch.ops.heddle, op.split()[0]).default
    torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))
