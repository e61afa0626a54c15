"""LoRA inside routed experts: the chain of ops, by each implementation, against merged matrices."""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.expert_route import Routed, Routing, TokenBatch
from kernels.expert_tiles import kernel as tiles_kernel
from kernels.expert_tiles import reference as tiles_reference
from kernels.gated import split_gate_up
from kernels.grouped_gemm import Activation, Layout
from kernels.grouped_gemm import host as gemm_host
from kernels.grouped_gemm import kernel as gemm_kernel
from kernels.grouped_gemm import reference as gemm_reference
from kernels.host import status
from kernels.host import takes as host_takes
from kernels.lora import LoraSite, LoraWeights, SiteAdapters
from kernels.lora import host as lora_host
from kernels.lora import kernel as lora_kernel
from kernels.lora import reference as lora_reference
from tests.support.breadth import always
from tests.support.kernel_device import DEVICE
from tests.support.lora_tables import attach
from tests.support.popularity import POPULARITIES, pick
from tests.support.routed import counters, cut_by_definition, route

# the interpreter's exp reports what a GPU's passes over: a sigmoid far from 0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]

HIDDEN, INNER, EXPERTS, TOP_K = 36, 20, 6, 3
RANKS = {1: 1, 2: 5, 3: 16, 4: 0, 6: 16}  # of the adapters with LoRA
TUNED = {3: (2,), 5: (0, 4)}  # adapter: experts in whose place it has its own, without LoRA. Adapter 3 does both
NO_UP, NO_DOWN = 1, 2  # adapters that leave a matrix out
SLOTS, MAX_RANK = 7, 16
PLACES = EXPERTS + sum(map(len, TUNED.values()))


class LoraExperts(NamedTuple):
    """gate_up [places, 2I, H] and down [places, H, I]; a site has the adapters beside it."""

    expert_map: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_site: LoraSite
    gate_up_adapters: SiteAdapters
    down_site: LoraSite
    down_adapters: SiteAdapters
    layout: Layout

    def each_pair_alone(self, x: Tensor, slots: Tensor, routed: Routed) -> Tensor:
        """[P, H] in order of pair number, by merged matrices; 0 for padding."""
        out = x.new_zeros(routed.places.numel(), HIDDEN)
        for pair, place in enumerate(routed.places.flatten().tolist()):
            if place >= 0:
                slot = int(slots[pair // TOP_K])
                weight = merged(self.gate_up, self.gate_up_site, self.gate_up_adapters, slot, place)
                gate, up = split_gate_up(weight @ x[pair // TOP_K], self.layout.interleaved)
                weight = merged(self.down, self.down_site, self.down_adapters, slot, place)
                out[pair] = weight @ (F.silu(gate) * up)
        return out


def merged(stack: Tensor, site: LoraSite, adapters: SiteAdapters, slot: int, place: int) -> Tensor:
    """W + s B A of one expert for one adapter, slice by slice. An adapter's own expert is as it is."""
    if place >= EXPERTS or slot not in adapters.by_slot:
        return stack[place]
    parts = zip(stack[place].split(site.widths), adapters.by_slot[slot], strict=True)
    return torch.cat(
        [part if it is None else part + it.scale * it.b[place].to(part) @ it.a[place].to(part) for part, it in parts]
    )


def lora_experts(interleaved: bool, dtype: torch.dtype = torch.float32) -> LoraExperts:
    """interleaved: gate_up is one slice, of which neither half can be left out. dtype: of all weights."""
    torch.manual_seed(7)
    expert_map, place = torch.arange(EXPERTS, dtype=torch.int32).repeat(SLOTS, 1), EXPERTS
    for slot, experts in TUNED.items():
        for expert in experts:
            expert_map[slot, expert] = place
            place += 1
    gate_up_site = LoraSite((2 * INNER,) if interleaved else (INNER, INNER), experts=EXPERTS)
    down_site = LoraSite((HIDDEN,), experts=EXPERTS)
    gate_up_adapters, down_adapters = SiteAdapters(), SiteAdapters()
    for slot, rank in RANKS.items():
        ups = [low_rank(slot, rank, HIDDEN, width, dtype) for width in gate_up_site.widths]
        downs = low_rank(slot, rank, INNER, HIDDEN, dtype)
        if slot == 3:  # gate and up share their a, and all experts the b of down
            ups = [it._replace(a=ups[0].a) for it in ups]
            downs = downs._replace(b=downs.b[:1].expand_as(downs.b))
        if slot == 6:  # all experts share the a of gate_up
            ups = [it._replace(a=ups[0].a[:1].expand_as(it.a)) for it in ups]
        gate_up_adapters.by_slot[slot] = [*ups[:1], None] if slot == NO_UP and len(ups) > 1 else [*ups]
        if slot != NO_DOWN:
            down_adapters.by_slot[slot] = [downs]
    attach(gate_up_site, gate_up_adapters, SLOTS)
    attach(down_site, down_adapters, SLOTS)
    gate_up = (torch.randn(PLACES, 2 * INNER, HIDDEN, device=DEVICE) * 0.3).to(dtype)
    down = (torch.randn(PLACES, HIDDEN, INNER, device=DEVICE) * 0.3).to(dtype)
    return LoraExperts(expert_map.to(DEVICE), gate_up, down, gate_up_site, gate_up_adapters, down_site, down_adapters,
                       Layout(interleaved=interleaved))  # fmt: skip


def low_rank(slot: int, rank: int, depth: int, width: int, dtype: torch.dtype) -> LoraWeights:
    a, b = torch.randn(EXPERTS, rank, depth, device=DEVICE), torch.randn(EXPERTS, width, rank, device=DEVICE)
    return LoraWeights(a.to(dtype), b.to(dtype), 0.05 * slot)


def by_kernels(case: LoraExperts, x: Tensor, slots: Tensor, routed: Routed, single_launch: bool) -> Tensor:
    """[P, H]."""
    tiles = tiles_kernel.expert_tiles(routed, slots, EXPERTS)
    shared = torch.zeros(1 + 2 * len(tiles.tiles), dtype=torch.int32, device=DEVICE)
    products = gemm_kernel.gate_up(x, case.gate_up, routed, None, case.layout)
    lora_kernel.expert_lora(products, x, case.gate_up_site, case.gate_up_adapters, routed, tiles, True, MAX_RANK,
                            shared, single_launch)  # fmt: skip
    assert not shared.any()
    h = gemm_kernel.activate(products, Activation(), case.layout.interleaved, routed, x.dtype)
    rows = gemm_kernel.down(h, case.down, routed, Layout())
    lora_kernel.expert_lora(rows, h, case.down_site, case.down_adapters, routed, tiles, False, MAX_RANK, shared,
                            single_launch)  # fmt: skip
    assert not shared.any()
    return rows


def by_references(case: LoraExperts, x: Tensor, slots: Tensor, routed: Routed, single_launch: bool) -> Tensor:
    tiles = tiles_reference.expert_tiles(routed, slots, EXPERTS)
    products = gemm_reference.gate_up(x, case.gate_up, routed, None, case.layout)
    lora_reference.expert_lora(products, x, case.gate_up_site, case.gate_up_adapters, routed, tiles, True, MAX_RANK,
                               None)  # fmt: skip
    h = gemm_reference.activate(products, Activation(), case.layout.interleaved, routed, x.dtype)
    rows = gemm_reference.down(h, case.down, routed, Layout())
    lora_reference.expert_lora(rows, h, case.down_site, case.down_adapters, routed, tiles, False, MAX_RANK, None)
    return rows


def by_host(case: LoraExperts, x: Tensor, slots: Tensor, routed: Routed, single_launch: bool) -> Tensor:
    if not host_takes(x):
        pytest.skip(status())
    tiles = tiles_reference.expert_tiles(routed, slots, EXPERTS)
    products = gemm_host.gate_up(x, case.gate_up, routed, None, case.layout)
    lora_host.expert_lora(products, x, case.gate_up_site, case.gate_up_adapters, routed, tiles, True, MAX_RANK)
    h = gemm_host.activate(products, Activation(), case.layout.interleaved, routed, x.dtype)
    rows = gemm_host.down(h, case.down, routed, Layout())
    lora_host.expert_lora(rows, h, case.down_site, case.down_adapters, routed, tiles, False, MAX_RANK)
    return rows


OPS = {by_kernels: gemm_kernel, by_references: gemm_reference, by_host: gemm_host}
ON_THE_HOST = pytest.mark.skipif(DEVICE != "cpu", reason="reads memory of the host")


def batch(case: LoraExperts, popularity: str, tokens: int, num_tokens: int) -> tuple[Tensor, Routed]:
    """Slots, in order and 0 for padding, and routed pairs."""
    adapters = sorted(pick(popularity, num_tokens, SLOTS, random.Random(6))) + [0] * (tokens - num_tokens)
    slots = torch.tensor(adapters, dtype=torch.int32, device=DEVICE)
    real = torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
    logits = torch.randn(tokens, EXPERTS, device=DEVICE)
    token_batch = TokenBatch(slots, real, counters())
    return slots, route(logits, Routing(TOP_K), case.expert_map, token_batch, 4, num_places=PLACES)


CHAINS = [(by_kernels, True), (by_kernels, False), (by_references, True),
          pytest.param(by_host, True, marks=ON_THE_HOST)]  # fmt: skip
CHAIN_NAMES = ["one launch", "two launches", "references", "host"]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("chain", "single_launch"), CHAINS, ids=CHAIN_NAMES)
@pytest.mark.parametrize(("popularity", "tokens", "num_tokens", "interleaved"), [
    *always([(popularity, 11, 9, False) for popularity in POPULARITIES], ("uniform", 11, 9, False)),
    ("distinct", 14, 14, True), *always([("zipf", 9, 7, True), ("identical", 1, 1, False)], ("identical", 1, 1, False)),
    ("uniform", 4, 0, False),
])  # fmt: skip
def test_lora_inside_experts(chain: Callable[..., Tensor], single_launch: bool, popularity: str, tokens: int,
                             num_tokens: int, interleaved: bool) -> None:  # fmt: skip
    """Each pair as if it were alone with its adapter merged into its expert; x of padding tokens is NaN."""
    case = lora_experts(interleaved)
    slots, routed = batch(case, popularity, tokens, num_tokens)
    x = torch.randn(tokens, HIDDEN, device=DEVICE)
    x[num_tokens:] = math.nan
    rows = chain(case, x, slots, routed, single_launch)
    want = case.each_pair_alone(x, slots, routed)
    real = num_tokens * TOP_K
    torch.testing.assert_close(rows[:real], want[:real], atol=1e-3, rtol=1e-5)
    assert bool(rows[real:].isnan().all())  # poisoned, and left alone
    got = OPS[chain].combine(rows, routed)
    weights = routed.weights.masked_fill(routed.places < 0, 0)
    torch.testing.assert_close(got, (want.view(tokens, TOP_K, -1) * weights[..., None]).sum(1), atol=1e-3, rtol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("chain", "single_launch"), CHAINS, ids=CHAIN_NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("interleaved", always([False, True], True))
def test_rows_of_others_have_the_bits_of_a_step_without_lora(
    chain: Callable[..., Tensor], single_launch: bool, dtype: torch.dtype, interleaved: bool
) -> None:
    """Where nobody in the step has LoRA inside experts the activation is not a launch of its own."""
    if chain is by_host and not host_takes(torch.empty(0, dtype=dtype)):
        pytest.skip("no type of the host's kernels")
    case, ops = lora_experts(interleaved, dtype), OPS[chain]
    slots, routed = batch(case, "distinct", 14, 14)
    x = torch.randn(14, HIDDEN, device=DEVICE).to(dtype)
    alone = ops.gate_up(x, case.gate_up, routed, Activation(), case.layout)
    alone = ops.down(alone, case.down, routed, Layout())
    rows = chain(case, x, slots, routed, single_launch)
    untouched = torch.tensor([
        int(slot) not in RANKS or place >= EXPERTS
        for slot, places in zip(slots, routed.places.tolist(), strict=True) for place in places
    ])  # fmt: skip
    assert rows.dtype == dtype and bool(untouched.any()) and not bool(untouched.all())
    assert torch.equal(rows[untouched], alone[untouched])
    exact = case._replace(gate_up=case.gate_up.float(), down=case.down.float()).each_pair_alone(
        x.float(), slots, routed
    )
    # rounded to dtype: z of both sites, h, and the rows twice; none is larger than the largest row
    atol = 4 * torch.finfo(dtype).eps * float(exact.abs().max())
    torch.testing.assert_close(rows.float(), exact, atol=atol, rtol=0)
    assert float((exact - alone)[~untouched].abs().max()) > 10 * atol


def test_mixed_batches_are_met() -> None:
    """The cases above have what they are there for."""
    case = lora_experts(False)
    slots, routed = batch(case, "distinct", 14, 14)
    cut = [(*divmod(entry, EXPERTS), first) for entry, first, _ in cut_by_definition(routed, slots, EXPERTS)]
    assert {slot for slot, _, _ in cut} >= set(RANKS)  # adapter 5 only where its experts are the base's
    assert max(sum(expert == it for _, it, _ in cut) for expert in range(EXPERTS)) > 2  # adapters on one expert
    assert bool((routed.places >= EXPERTS).any()) and bool((slots == 0).any())
    weights = [it for adapter in case.gate_up_adapters.by_slot.values() for it in adapter if it is not None]
    assert {it.a.shape[1] for it in weights} == {0, 1, 5, 16} and 0 in {it.a.stride(0) for it in weights}
    gate, up = case.gate_up_adapters.by_slot[3]
    assert gate is not None and up is not None and gate.a is up.a
