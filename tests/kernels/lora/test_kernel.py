"""lora's kernels against its reference: mixed ranks, slices, gains, both ways to launch."""

import math
import random

import pytest
import torch
from torch import Tensor

from kernels.adapter_rows import AdapterTiles, Segment, cut
from kernels.expert_route import Routed, Routing, TokenBatch
from kernels.expert_route.reference import expert_route
from kernels.lora import NOTHING, TABLE_FIELDS, Field, LoraSite, LoraWeights, SiteAdapters, table_row, table_rows
from kernels.lora import kernel as lora_kernel
from kernels.lora import reference as lora_reference
from tests.support.kernel_device import DEVICE
from tests.support.lora_tables import attach
from tests.support.popularity import POPULARITIES, pick

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
    monkeypatch.setattr(lora_kernel, "_splits", lambda depth, *_, **__: 1 if depth < 32 else 2)


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
@pytest.mark.parametrize("popularity", POPULARITIES)
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


# -- inside routed experts ---

EXPERT_MAP = [[0, 3, 2], [1, 2, 4], [5, 6, 3], [4, 0, 6]]  # of four adapters, to expert places: the slots above
CHOICES = 2


def route(popularity: str, tokens: int, num_tokens: int, tile: int = 4) -> Routed:
    """Tiles in an order that nobody promised, garbage behind them and behind the pairs of real tokens."""
    adapters = torch.tensor(pick(popularity, tokens, 4, random.Random(3)), dtype=torch.int32, device=DEVICE)
    expert_map = torch.tensor(EXPERT_MAP, dtype=torch.int32, device=DEVICE)
    real = torch.tensor([num_tokens], dtype=torch.int32, device=DEVICE)
    logits = torch.randn(tokens, len(EXPERT_MAP[0]), device=DEVICE)
    routed = expert_route(logits, Routing(CHOICES), expert_map, SLOTS, TokenBatch(adapters, real), tile)
    routed.pairs[num_tokens * CHOICES :] = 10**6
    garbage = torch.full((3, 3), 10**6, dtype=torch.int32, device=DEVICE)
    return routed._replace(tiles=torch.cat([routed.tiles.flip(0), garbage]))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("single_launch", [True, False], ids=["one launch", "two launches"])
@pytest.mark.parametrize("gathers", [True, False])
@pytest.mark.parametrize(("popularity", "tokens", "num_tokens"), [
    *((popularity, 6, 6) for popularity in POPULARITIES), ("uniform", 7, 5), ("uniform", 1, 1), ("uniform", 3, 0),
])  # fmt: skip
def test_expert_lora(single_launch: bool, gathers: bool, popularity: str, tokens: int, num_tokens: int) -> None:
    depth, widths = (40, (17, 20)) if gathers else (33, (33,))
    site, held = make_site(depth, widths, gains=False)
    routed = route(popularity, tokens, num_tokens)
    counters = torch.zeros(1 + len(routed.tiles) * len(widths), dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # the second launch finds the counters zero
        x = torch.randn(tokens * (1 if gathers else CHOICES), depth, device=DEVICE)
        x[num_tokens * (1 if gathers else CHOICES) :] = math.nan
        y = torch.randn(tokens * CHOICES, sum(widths), device=DEVICE)
        want, got = y.clone(), y.clone()
        lora_reference.expert_lora(want, x, site, held, routed, gathers, MAX_RANK, None)
        lora_kernel.expert_lora(got, x, site, held, routed, gathers, MAX_RANK, counters, single_launch)
        torch.testing.assert_close(got, want, atol=ATOL, rtol=1e-5)
        assert torch.equal(got[num_tokens * CHOICES :], y[num_tokens * CHOICES :])
        assert not counters.any()


@pytest.mark.usefixtures("small_blocks")
def test_expert_lora_with_gains() -> None:
    site, held = make_site(24, (10, 18), gains=True)
    routed = route("uniform", 5, 5)
    counters = torch.zeros(1 + len(routed.tiles) * 2, dtype=torch.int32, device=DEVICE)
    x, y = torch.randn(10, 24, device=DEVICE), torch.randn(10, 28, device=DEVICE)
    want = y.clone()
    lora_reference.expert_lora(want, x, site, held, routed, False, MAX_RANK, None)
    lora_kernel.expert_lora(y, x, site, held, routed, False, MAX_RANK, counters)
    torch.testing.assert_close(y, want, atol=ATOL, rtol=1e-5)


@pytest.mark.parametrize("choices", [0, CHOICES])
def test_the_op_for_experts_is_registered_rightly(small_blocks: None, choices: int) -> None:
    _, held = make_site(16, (8,), gains=False)
    routed = route("uniform", 2, 2)
    counters = torch.zeros(1 + len(routed.tiles), dtype=torch.int32, device=DEVICE)
    y, x = torch.randn(4, 8, device=DEVICE), torch.randn(2 if choices else 4, 16, device=DEVICE)
    arguments = (y, x, held.table, held.offsets, routed.pairs, routed.tiles, routed.num_tiles, counters, 8, 4,
                 MAX_RANK, choices, False, True)  # fmt: skip
    torch.library.opcheck(
        torch.ops.heddle.expert_lora.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


# -- what the host makes ---


def test_a_table_row_keeps_the_scale_exactly() -> None:
    weights = LoraWeights(Tensor(8, 4), Tensor(4, 8), -0.1)
    row = table_row(weights)
    assert len(row) == TABLE_FIELDS and row[Field.RANK] == 8 and row[Field.NEXT] == 0
    assert torch.tensor(row)[Field.SCALE].int().view(torch.float32).item() == torch.tensor(-0.1).item()


def test_slot_0_of_a_table_says_whether_any_adapter_acts() -> None:
    site, held = LoraSite((4, 2)), SiteAdapters()
    assert table_rows(site, held, 0) == table_rows(site, held, 3) == [NOTHING] * 2
    held.by_slot[3] = [None, LoraWeights(torch.empty(8, 16), torch.empty(2, 8), 1.0)]
    assert [row[Field.A] for row in table_rows(site, held, 0)] == [1, 1]
    assert [row[Field.RANK] for row in table_rows(site, held, 3)] == [0, 8]


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
