"""lora's kernels against its reference: mixed ranks, slices, gains, both ways to launch."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.adapter_rows import AdapterTiles, Segment, cut
from kernels.expert_route import Routed, Routing, TokenBatch
from kernels.expert_route.reference import expert_route
from kernels.expert_tiles import ExpertTiles
from kernels.expert_tiles.reference import expert_tiles
from kernels.lora import TABLE_FIELDS, Field, LoraSite, LoraWeights, SiteAdapters, table_row, table_rows
from kernels.lora import kernel as lora_kernel
from kernels.lora import reference as lora_reference
from tests.support.breadth import always
from tests.support.kernel_device import DEVICE
from tests.support.lora_tables import attach
from tests.support.popularity import POPULARITIES, pick
from tests.support.routed import with_garbage

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poisoned_memory")]

ATOL = 2e-4  # float32 sums of a few hundred products of order 1, of magnitude up to 100
RANKS = {1: 1, 2: 5, 4: 8, 5: 16, 6: 64}  # slot 3 has a LoRA, but none here; slot 0 is the base
SLOTS = 7
MAX_RANK = 64


def make_site(
    depth: int, widths: tuple[int, ...], gains: bool, own_inputs: bool = False, transposed: bool = False
) -> tuple[LoraSite, SiteAdapters]:
    """Each adapter leaves out one slice, if there are several."""
    torch.manual_seed(0)
    site, held = LoraSite(widths, own_inputs, transposed), SiteAdapters()
    for slot, rank in RANKS.items():
        for index, width in enumerate(widths):
            if len(widths) > 1 and index == slot % len(widths):
                continue
            gain = torch.rand(width, device=DEVICE) + 0.5 if gains and slot != 2 else None
            a, b = torch.randn(rank, depth, device=DEVICE), torch.randn(width, rank, device=DEVICE)
            if transposed:
                a, b = a.t().contiguous(), b.t().contiguous()
            held.by_slot.setdefault(slot, [None] * len(widths))[index] = LoraWeights(a, b, 0.1 * slot, gain)
    attach(site, held, SLOTS)
    return site, held


def make_tiles(slots: list[int], slices: int, tile: int, spare: int = 3) -> AdapterTiles:
    spans = [
        Segment(slots.index(slot), len(slots) - slots[::-1].index(slot), slot) for slot in sorted(set(slots)) if slot
    ]
    tiles = cut(spans, tile)
    garbage = [(10**6, 10**6, 10**6)] * spare  # behind the last tile nothing is looked at
    counters = torch.zeros(1 + slices * (len(tiles) + spare), dtype=torch.int32, device=DEVICE)
    return AdapterTiles(spans, torch.tensor(tiles + garbage, dtype=torch.int32, device=DEVICE),
                        torch.tensor([len(tiles)], dtype=torch.int32, device=DEVICE), tile, counters)  # fmt: skip


def batch(popularity: str, count: int) -> list[int]:
    return sorted(pick(popularity, count, SLOTS, random.Random(3)))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes that the interpreter gets through, with more than one block and split in every direction."""
    monkeypatch.setattr(lora_kernel, "_blocks", lambda *_: (16, 16, 4))
    monkeypatch.setattr(lora_kernel, "splits_of", lambda depth, *_, **__: 1 if depth < 32 else 2)


def check(depth: int, widths: tuple[int, ...], slots: list[int], single_launch: bool, gains: bool, tile: int = 4,
          own_inputs: bool = False, transposed: bool = False) -> None:  # fmt: skip
    site, held = make_site(depth, widths, gains, own_inputs, transposed)
    tiles = make_tiles(slots, len(widths), tile)
    bias = torch.randn(sum(widths), device=DEVICE) if gains else None
    for _ in range(2):  # the second launch finds the counters zero
        x = torch.randn(len(slots), depth * (len(widths) if own_inputs else 1), device=DEVICE)
        y = torch.randn(len(slots), sum(widths), device=DEVICE)
        want, got = y.clone(), y.clone()
        lora_reference.lora(want, x, site, held, tiles, MAX_RANK, bias)
        lora_kernel.lora(got, x, site, held, tiles, MAX_RANK, bias, single_launch)
        torch.testing.assert_close(got, want, atol=ATOL, rtol=1e-5)
        assert tiles.counters is not None and not tiles.counters.any()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("single_launch", [True, False], ids=["one launch", "two launches"])
@pytest.mark.parametrize("popularity", always(POPULARITIES, "zipf", "distinct"))
@pytest.mark.parametrize(("depth", "widths"), [(40, (33,)), (33, (17, 5, 20))])
def test_lora(single_launch: bool, popularity: str, depth: int, widths: tuple[int, ...]) -> None:
    check(depth, widths, batch(popularity, 11), single_launch, gains=False)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("slots", [[6], [0], [3, 3], []], ids=str)
def test_small_batches(slots: list[int]) -> None:
    check(16, (8, 24), slots, single_launch=True, gains=False)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("single_launch", [True, False])
def test_gains(single_launch: bool) -> None:
    check(24, (10, 18), batch("uniform", 9), single_launch, gains=True)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("single_launch", [True, False])
def test_slices_with_inputs_of_their_own(single_launch: bool) -> None:
    """As the heads of absorbed attention: transposed into the latent space, plain out of it."""
    check(24, (20, 20, 20), batch("uniform", 9), single_launch, False, own_inputs=True, transposed=True)
    check(20, (12, 12, 12), batch("uniform", 9), single_launch, False, own_inputs=True)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("single_launch", [True, False])
def test_gains_of_slices_with_inputs_of_their_own(single_launch: bool) -> None:
    """As on the value side of absorbed attention: each head reads its own columns and has its own part of the gain."""
    check(20, (12, 12, 12), batch("uniform", 9), single_launch, gains=True, own_inputs=True)


@pytest.mark.usefixtures("small_blocks")
def test_a_gain_without_low_rank_weights() -> None:
    site, held = make_site(16, (8,), gains=False)
    gain = torch.rand(8, device=DEVICE)
    assert held.table is not None
    held.table[3, 0] = torch.tensor(table_row(LoraWeights(torch.empty(0, 16), torch.empty(8, 0), 1.0, gain)))
    y = torch.randn(2, 8, device=DEVICE)
    got = y.clone()
    tiles = make_tiles([0, 3], 1, 4)
    lora_kernel.lora(got, torch.randn(2, 16, device=DEVICE), site, held, tiles, MAX_RANK, None, True)
    torch.testing.assert_close(got, torch.stack([y[0], y[1] * gain]))


@pytest.mark.usefixtures("small_blocks")
def test_strided_rows_and_a_view_of_a_larger_table() -> None:
    site, held = make_site(32, (16, 8), gains=False)
    assert held.table is not None
    whole = torch.full((SLOTS, 9, TABLE_FIELDS), 2**40, dtype=torch.int64, device=DEVICE)
    whole[:, 3:5] = held.table
    held.table = whole[:, 3:5]
    slots = batch("uniform", 7)
    tiles = make_tiles(slots, 2, 4)
    x = torch.randn(7, 50, device=DEVICE)[:, 5:37]
    y = torch.full((7, 40), math.nan, device=DEVICE)
    y[:, :24] = torch.randn(7, 24, device=DEVICE)
    want = y[:, :24].clone()
    lora_reference.lora(want, x, site, held, tiles, MAX_RANK)
    lora_kernel.lora(y[:, :24], x, site, held, tiles, MAX_RANK)
    torch.testing.assert_close(y[:, :24], want, atol=ATOL, rtol=1e-5)
    assert bool(y[:, 24:].isnan().all())


def test_the_op_is_registered_rightly(small_blocks: None) -> None:
    _, held = make_site(16, (8,), gains=False)
    tiles = make_tiles([1, 2], 1, 4)
    y, x = torch.randn(2, 8, device=DEVICE), torch.randn(2, 16, device=DEVICE)
    arguments = (y, x, held.table, held.offsets, None, tiles.tiles, tiles.num_tiles, tiles.counters, 8, 4, MAX_RANK,
                 False, False, True)  # fmt: skip
    torch.library.opcheck(torch.ops.heddle.lora.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("single_launch", [True, False])
def test_a_launch_where_no_adapter_acts_looks_no_further(single_launch: bool) -> None:
    """As a captured batch launches one at every site: not even at the rows of the table, which are wrong here."""
    site, held = make_site(16, (8, 24), gains=False)
    held.by_slot.clear()
    assert held.table is not None
    held.table[0] = torch.tensor(table_rows(site, held, 0), device=DEVICE)
    assert held.table[1:].any()
    tiles = make_tiles([1, 3, 3], 2, 4)
    y = torch.randn(3, 32, device=DEVICE)
    got = y.clone()
    lora_kernel.lora(got, torch.randn(3, 16, device=DEVICE), site, held, tiles, MAX_RANK, None, single_launch)
    assert torch.equal(got, y)
    assert tiles.counters is not None and not tiles.counters.any()


# -- inside routed experts ---

EXPERTS = 5
CHOICES = 2


def make_expert_site(depth: int, widths: tuple[int, ...], transposed: bool = False) -> tuple[LoraSite, SiteAdapters]:
    """As make_site, with matrices for each expert: each adapter's lie otherwise."""
    torch.manual_seed(0)
    site, held = LoraSite(widths, transposed=transposed, experts=EXPERTS), SiteAdapters()
    for slot, rank in RANKS.items():
        shared = matrices(rank, depth, transposed)
        for index, width in enumerate(widths):
            if len(widths) > 1 and index == slot % len(widths) and slot != 4:
                continue
            a, b = matrices(rank, depth, transposed), matrices(width, rank, transposed)
            match slot:
                case 1:  # all experts share one
                    a = a[:1].expand_as(a)
                case 2:  # with other things between them
                    a = matrices(rank, depth, transposed, between=2)
                    b = matrices(width, rank, transposed, between=1)
                case 4:  # the slices share theirs
                    a = shared
                case 5:
                    b = b[:1].expand_as(b)
            held.by_slot.setdefault(slot, [None] * len(widths))[index] = LoraWeights(a, b, 0.1 * slot)
    attach(site, held, SLOTS)
    return site, held


def matrices(rows: int, columns: int, transposed: bool, between: int = 0) -> Tensor:
    """[EXPERTS, rows, columns], or transposed, of a larger tensor that has `between` more after each."""
    shape = (columns, rows) if transposed else (rows, columns)
    whole = torch.randn(EXPERTS, (1 + between) * shape[0], shape[1], device=DEVICE)
    return whole[:, : shape[0]]


def cut_batch(popularity: str, tokens: int, num_tokens: int, tile: int = 4) -> tuple[Routed, ExpertTiles]:
    """Tiles in an order that nobody promised, garbage behind them and behind the pairs of real tokens."""
    slots = torch.tensor(batch(popularity, tokens), dtype=torch.int32, device=DEVICE)
    expert_map = torch.arange(EXPERTS, dtype=torch.int32, device=DEVICE).repeat(SLOTS, 1)
    expert_map[4, 1] = EXPERTS + 1  # an expert of its own, where its LoRA does not act
    real = torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
    logits = torch.randn(tokens, EXPERTS, device=DEVICE)
    routed = expert_route(logits, Routing(CHOICES), expert_map, EXPERTS + 2, TokenBatch(slots, real), tile)
    routed = with_garbage(routed)
    cut = expert_tiles(routed, slots, EXPERTS)
    garbage = torch.full((3, 3), 10**6, dtype=torch.int32, device=DEVICE)
    return routed, cut._replace(tiles=torch.cat([cut.tiles.flip(0), garbage]))


def check_experts(depth: int, widths: tuple[int, ...], gathers: bool, popularity: str, tokens: int, num_tokens: int,
                  single_launch: bool | None, transposed: bool = False) -> None:  # fmt: skip
    site, held = make_expert_site(depth, widths, transposed)
    routed, tiles = cut_batch(popularity, tokens, num_tokens)
    counters = torch.zeros(1 + len(tiles.tiles) * len(widths), dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # the second launch finds the counters zero
        x = torch.randn(tokens * (1 if gathers else CHOICES), depth, device=DEVICE)
        x[num_tokens * (1 if gathers else CHOICES) :] = math.nan
        y = torch.randn(tokens * CHOICES, sum(widths), device=DEVICE)
        want, got = y.clone(), y.clone()
        lora_reference.expert_lora(want, x, site, held, routed, tiles, gathers, MAX_RANK, None)
        lora_kernel.expert_lora(got, x, site, held, routed, tiles, gathers, MAX_RANK, counters, single_launch)
        torch.testing.assert_close(got, want, atol=ATOL, rtol=1e-5)
        assert torch.equal(got[num_tokens * CHOICES :], y[num_tokens * CHOICES :])
        assert not counters.any()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("single_launch", [True, False], ids=["one launch", "two launches"])
@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize(("popularity", "tokens", "num_tokens"), [
    *always([(popularity, 9, 9) for popularity in POPULARITIES], ("zipf", 9, 9)),
    ("uniform", 7, 5), ("identical", 1, 1), ("uniform", 3, 0),
])  # fmt: skip
def test_expert_lora(single_launch: bool, gathers: bool, popularity: str, tokens: int, num_tokens: int) -> None:
    depth, widths = (40, (17, 20)) if gathers else (33, (33,))
    check_experts(depth, widths, gathers, popularity, tokens, num_tokens, single_launch)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("single_launch", [True, False], ids=["one launch", "two launches"])
def test_transposed_matrices_of_experts(single_launch: bool) -> None:
    check_experts(20, (36,), True, "distinct", 8, 7, single_launch, transposed=True)


@pytest.mark.usefixtures("small_blocks")
def test_with_too_few_counters_there_are_two_launches() -> None:
    """They are left alone: here they are not even zero."""
    site, held = make_expert_site(16, (8, 12))
    routed, tiles = cut_batch("uniform", 6, 6)
    x, y = torch.randn(6, 16, device=DEVICE), torch.randn(12, 20, device=DEVICE)
    want = y.clone()
    lora_reference.expert_lora(want, x, site, held, routed, tiles, True, MAX_RANK, None)
    counters = torch.full((2 * len(tiles.tiles),), 7, dtype=torch.int32, device=DEVICE)
    lora_kernel.expert_lora(y, x, site, held, routed, tiles, True, MAX_RANK, counters)
    torch.testing.assert_close(y, want, atol=ATOL, rtol=1e-5)
    assert bool((counters == 7).all())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("is_enough", [True, False])
def test_as_many_launches_as_there_are_counters_for(is_enough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {
        name: Launches(getattr(lora_kernel, name)) for name in ("lora_kernel", "shrink_kernel", "expand_kernel")
    }
    for name, spy in launched.items():
        monkeypatch.setattr(lora_kernel, name, spy)
    site, held = make_expert_site(16, (8, 12))
    routed, tiles = cut_batch("uniform", 6, 6)
    x, y = torch.randn(6, 16, device=DEVICE), torch.randn(12, 20, device=DEVICE)
    counters = torch.zeros(int(is_enough) + 2 * len(tiles.tiles), dtype=torch.int32, device=DEVICE)
    lora_kernel.expert_lora(y, x, site, held, routed, tiles, True, MAX_RANK, counters)
    assert [it.count for it in launched.values()] == ([1, 0, 0] if is_enough else [0, 1, 1])


class Launches:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any) -> None:
        self._kernel, self.count = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.count += 1
        return self._kernel[grid]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("single_launch", [True, False], ids=["one launch", "two launches"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_added_to_in_float32_stays_in_float32(dtype: torch.dtype, single_launch: bool) -> None:
    """y is so much larger than what is added that in x's type the sum would be that of y alone."""
    site, held = make_expert_site(40, (17, 20))
    exact = SiteAdapters({slot: list(weights) for slot, weights in held.by_slot.items()})
    for slot, weights in held.by_slot.items():
        held.by_slot[slot] = [it and it._replace(a=with_strides(it.a, dtype), b=with_strides(it.b, dtype))
                              for it in weights]  # fmt: skip
        exact.by_slot[slot] = [it and it._replace(a=it.a.float(), b=it.b.float()) for it in held.by_slot[slot]]
    attach(site, held, SLOTS)
    routed, tiles = cut_batch("uniform", 9, 7)
    counters = torch.zeros(1 + len(tiles.tiles) * 2, dtype=torch.int32, device=DEVICE)
    x, large = torch.randn(9, 40, device=DEVICE).to(dtype), 2.0**20
    y = torch.randn(18, 37, device=DEVICE) + large
    want, got = y - large, y.clone()
    lora_reference.expert_lora(want, x.float(), site, exact, routed, tiles, True, MAX_RANK, None)
    lora_kernel.expert_lora(got, x, site, held, routed, tiles, True, MAX_RANK, counters, single_launch)
    added = want - (y - large)
    # z is rounded to x's type, y to 2^-4
    assert got.dtype == torch.float32 and float(added.abs().max()) < large * torch.finfo(dtype).eps / 2
    atol = float(added.abs().max()) * torch.finfo(dtype).eps + 2**-4
    assert atol < float(added.abs().max()) / 50
    torch.testing.assert_close(got - large, want, atol=atol, rtol=0)


def with_strides(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """In another type, and still a matrix that all experts share where it was one; what lies between them goes."""
    shared = matrices.stride(0) == 0
    return matrices[:1].to(dtype).expand_as(matrices) if shared else matrices.to(dtype).contiguous()


@pytest.mark.usefixtures("small_blocks")
def test_matrices_of_experts_may_lie_far_apart() -> None:
    """Further than 32 bits count elements. Only the last expert's are in memory that there is."""
    site, held = make_expert_site(16, (8,))
    assert held.table is not None
    apart, last = 1 << 33, EXPERTS - 1
    weights = held.by_slot[6][0]
    assert weights is not None
    for field, stride, it in ((Field.A, Field.A_STRIDE, weights.a), (Field.B, Field.B_STRIDE, weights.b)):
        held.table[6, 0, field] = it[last].data_ptr() - last * apart * it.itemsize
        held.table[6, 0, stride] = apart
    routed, tiles = cut_batch("uniform", 3, 3)
    routed.pairs[:6] = torch.randperm(6, device=DEVICE).int()
    tiles.tiles[0] = torch.tensor([6 * EXPERTS + last, 1, 4])
    tiles.num_tiles.fill_(1)
    x, y = torch.randn(6, 16, device=DEVICE), torch.randn(6, 8, device=DEVICE)
    want = y.clone()
    lora_reference.expert_lora(want, x, site, held, routed, tiles, False, MAX_RANK, None)
    counters = torch.zeros(1 + len(tiles.tiles), dtype=torch.int32, device=DEVICE)
    lora_kernel.expert_lora(y, x, site, held, routed, tiles, False, MAX_RANK, counters)
    torch.testing.assert_close(y, want, atol=ATOL, rtol=1e-5)


@pytest.mark.parametrize("choices", [0, CHOICES])
def test_the_op_for_experts_is_registered_rightly(small_blocks: None, choices: int) -> None:
    _, held = make_expert_site(16, (8,))
    routed, tiles = cut_batch("uniform", 2, 2)
    counters = torch.zeros(1 + len(tiles.tiles), dtype=torch.int32, device=DEVICE)
    y, x = torch.randn(4, 8, device=DEVICE), torch.randn(2 if choices else 4, 16, device=DEVICE)
    arguments = (y, x, held.table, held.offsets, routed.pairs, tiles.tiles, tiles.num_tiles, counters, 8, 4,
                 MAX_RANK, EXPERTS, choices, False, True)  # fmt: skip
    torch.library.opcheck(
        torch.ops.heddle.expert_lora.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
