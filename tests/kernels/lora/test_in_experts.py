"""LoRA inside routed experts: the chain of ops, by kernels and by references, against merged matrices."""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.expert_route import Routed, Routing, TokenBatch
from kernels.grouped_gemm import Activation, Layout
from kernels.grouped_gemm import kernel as gemm_kernel
from kernels.grouped_gemm import reference as gemm_reference
from kernels.lora import LoraSite, LoraWeights, SiteAdapters
from kernels.lora import kernel as lora_kernel
from kernels.lora import reference as lora_reference
from tests.support.kernel_device import DEVICE
from tests.support.lora_tables import attach
from tests.support.popularity import POPULARITIES, pick
from tests.support.routed import counters, route

# the interpreter's exp reports what a GPU's passes over: a sigmoid far from 0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]

HIDDEN, INNER, EXPERTS = 36, 20, 6
RANKS = {1: (1, (0, 4)), 2: (5, range(EXPERTS)), 3: (16, (2, 4, 5)), 4: (0, (1,))}  # adapter: rank and experts
TUNED = 4, 3  # this adapter has a matrix of its own for this expert, and no LoRA there
ADAPTERS, MAX_RANK = 5, 16


class LoraExperts(NamedTuple):
    """gate_up [matrices, 2I, H] and down [matrices, H, I]; several places share a matrix."""

    expert_map: Tensor
    matrix_of: list[int]
    gate_up: Tensor
    down: Tensor
    gate_up_site: LoraSite
    gate_up_adapters: SiteAdapters
    down_site: LoraSite
    down_adapters: SiteAdapters

    def each_pair_alone(self, x: Tensor, routed: Routed) -> Tensor:
        """[P, H] in order of pair number, by merged matrices; 0 for padding."""
        out = x.new_zeros(routed.places.numel(), HIDDEN)
        top_k = routed.places.shape[1]
        for pair, place in enumerate(routed.places.flatten().tolist()):
            if place >= 0:
                matrix = self.matrix_of[place]
                up_weight = merged(self.gate_up[matrix], self.gate_up_site, self.gate_up_adapters, place)
                gate, up = (up_weight @ x[pair // top_k]).chunk(2)
                down_weight = merged(self.down[matrix], self.down_site, self.down_adapters, place)
                out[pair] = down_weight @ (F.silu(gate) * up)
        return out


def merged(weight: Tensor, site: LoraSite, adapters: SiteAdapters, place: int) -> Tensor:
    """W + s B A, slice by slice."""
    parts = zip(weight.split(site.widths), adapters.by_slot.get(place, [None] * len(site.widths)), strict=True)
    return torch.cat([part if it is None else part + it.scale * it.b @ it.a for part, it in parts])


def lora_experts() -> LoraExperts:
    """Of their three slices most expert places have two, so that every one is left out somewhere."""
    torch.manual_seed(7)
    gate_up = torch.randn(EXPERTS + 1, 2 * INNER, HIDDEN, device=DEVICE) * 0.3
    down = torch.randn(EXPERTS + 1, HIDDEN, INNER, device=DEVICE) * 0.3
    sites, held = (LoraSite((INNER, INNER)), LoraSite((HIDDEN,))), (SiteAdapters(), SiteAdapters())
    expert_map = torch.arange(EXPERTS, dtype=torch.int32).repeat(ADAPTERS, 1)
    matrix_of = list(range(EXPERTS))
    for adapter, (rank, experts) in RANKS.items():
        for expert in experts:
            place = expert_map[adapter, expert] = len(matrix_of)
            matrix_of.append(expert)
            for number, (at, index, depth, width) in enumerate(
                ((0, 0, HIDDEN, INNER), (0, 1, HIDDEN, INNER), (1, 0, INNER, HIDDEN))
            ):
                if (place + number) % 4:
                    a, b = torch.randn(rank, depth, device=DEVICE), torch.randn(width, rank, device=DEVICE)
                    weights = held[at].by_slot.setdefault(place, [None] * len(sites[at].widths))
                    weights[index] = LoraWeights(a, b, 0.05 * adapter)
    expert_map[TUNED] = len(matrix_of)
    matrix_of.append(EXPERTS)
    for site, adapters in zip(sites, held, strict=True):
        attach(site, adapters, len(matrix_of))
    return LoraExperts(expert_map.to(DEVICE), matrix_of, gate_up, down, sites[0], held[0], sites[1], held[1])


def by_kernels(case: LoraExperts, x: Tensor, routed: Routed, single_launch: bool) -> Tensor:
    """[P, H]."""
    ups, downs = case.gate_up[case.matrix_of], case.down[case.matrix_of]
    shared = torch.zeros(1 + 2 * len(routed.tiles), dtype=torch.int32, device=DEVICE)
    products = gemm_kernel.gate_up(x, ups, routed, None, Layout())
    lora_kernel.expert_lora(products, x, case.gate_up_site, case.gate_up_adapters, routed, True, MAX_RANK, shared,
                            single_launch)  # fmt: skip
    assert not shared.any()
    h = gemm_kernel.activate(products, Activation(), False, routed)
    rows = gemm_kernel.down(h, downs, routed, Layout())
    lora_kernel.expert_lora(rows, h, case.down_site, case.down_adapters, routed, False, MAX_RANK, shared,
                            single_launch)  # fmt: skip
    assert not shared.any()
    return rows


def by_references(case: LoraExperts, x: Tensor, routed: Routed, single_launch: bool) -> Tensor:
    ups, downs = case.gate_up[case.matrix_of], case.down[case.matrix_of]
    products = gemm_reference.gate_up(x, ups, routed, None, Layout())
    lora_reference.expert_lora(products, x, case.gate_up_site, case.gate_up_adapters, routed, True, MAX_RANK, None)
    h = gemm_reference.activate(products, Activation(), False, routed)
    rows = gemm_reference.down(h, downs, routed, Layout())
    lora_reference.expert_lora(rows, h, case.down_site, case.down_adapters, routed, False, MAX_RANK, None)
    return rows


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("chain", "single_launch"), [(by_kernels, True), (by_kernels, False), (by_references, True)],
                         ids=["one launch", "two launches", "references"])  # fmt: skip
@pytest.mark.parametrize(("popularity", "tokens", "num_tokens"), [
    *((popularity, 9, 7) for popularity in POPULARITIES), ("distinct", 10, 10), ("identical", 1, 1), ("uniform", 4, 0),
])  # fmt: skip
def test_lora_inside_experts(chain: Callable[..., Tensor], single_launch: bool, popularity: str, tokens: int,
                             num_tokens: int) -> None:  # fmt: skip
    """Each pair as if it were alone with the merged matrices of its place; x of padding tokens is NaN."""
    case = lora_experts()
    adapters = pick(popularity, tokens, ADAPTERS, random.Random(6))
    batch = TokenBatch(torch.tensor(adapters, dtype=torch.int32, device=DEVICE),
                       torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE), counters())  # fmt: skip
    logits, x = torch.randn(tokens, EXPERTS, device=DEVICE), torch.randn(tokens, HIDDEN, device=DEVICE)
    routed = route(logits, Routing(3), case.expert_map, batch, 4, num_places=len(case.matrix_of))
    x[num_tokens:] = math.nan
    rows = chain(case, x, routed, single_launch)
    want = case.each_pair_alone(x, routed)
    real = num_tokens * 3
    torch.testing.assert_close(rows[:real], want[:real], atol=1e-3, rtol=1e-5)
    assert bool(rows[real:].isnan().all())  # poisoned, and left alone
    got = (gemm_kernel if chain is by_kernels else gemm_reference).combine(rows, routed)
    weights = routed.weights.masked_fill(routed.places < 0, 0)
    torch.testing.assert_close(got, (want.view(tokens, 3, -1) * weights[..., None]).sum(1), atol=1e-3, rtol=1e-5)


def test_mixed_ranks_are_met() -> None:
    """The case above has what it is there for."""
    case = lora_experts()
    weights = [it for adapter in case.gate_up_adapters.by_slot.values() for it in adapter if it is not None]
    assert {it.a.shape[0] for it in weights} == {0, 1, 5, 16}
    assert len(set(case.matrix_of)) < len(case.matrix_of)  # places share matrices
    assert len(case.gate_up_adapters.by_slot) < len(case.matrix_of)  # some have no LoRA
