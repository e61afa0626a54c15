"""lora's host kernel against float64, on shapes and memory that its reference never meets; unread memory is NaN."""

import math
import random

import pytest
import torch
from torch import Tensor

from kernels.adapter_rows import AdapterTiles
from kernels.lora import LoraSite, LoraWeights, SiteAdapters, lora
from tests.support.lora_tables import attach, tiles_of
from tests.support.popularity import POPULARITIES, pick

pytestmark = pytest.mark.usefixtures("poisoned_memory", "host_kernels")

RANKS = {1: 1, 2: 0, 3: 5, 4: 8, 5: 16, 6: 17, 7: 64, 9: 3}  # slot 8 has nothing at the site
SLOTS = 10
ATOL = 1e-4  # float32 sums of up to a few hundred products of order 1, of magnitude up to 100
TYPES = [torch.float32, torch.bfloat16]


def apart(*shape: int, dtype: torch.dtype) -> Tensor:
    """Rows with NaN between them, as slices of a wider projection have it; the first begins at 16 bytes."""
    whole = torch.full((*shape[:-1], shape[-1] + 5), math.nan, dtype=dtype)
    whole[..., : shape[-1]] = torch.randn(*shape).to(dtype)
    return whole[..., : shape[-1]]


def a_site(
    widths: tuple[int, ...], depth: int, dtype: torch.dtype, own_inputs: bool = False, transposed: bool = False,
    gains: bool = False,
) -> tuple[LoraSite, SiteAdapters]:  # fmt: skip
    """Every third (slot, slice) is left out; of the others every second has a gain, if there are gains."""
    site, held = LoraSite(widths, own_inputs, transposed), SiteAdapters()
    for slot, rank in RANKS.items():
        weights: list[LoraWeights | None] = []
        for index, width in enumerate(widths):
            a, b = torch.randn(rank, depth), torch.randn(width, rank)
            if transposed:
                a, b = a.t().contiguous(), b.t().contiguous()
            gain = torch.rand(width) + 0.5 if gains and (slot + index) % 2 else None
            its = LoraWeights(a.to(dtype), b.to(dtype), 0.05 * slot, gain)
            weights.append(None if (slot + index) % 3 == 0 and len(widths) > 1 else its)
        held.by_slot[slot] = weights
    attach(site, held, SLOTS, "cpu")
    return site, held


def expected(y: Tensor, x: Tensor, site: LoraSite, held: SiteAdapters, slots: list[int], bias: Tensor | None) -> Tensor:
    out, inputs = y.double(), x.double()
    for row, slot in enumerate(slots):
        column = 0
        for index, (width, its) in enumerate(zip(site.widths, held.by_slot.get(slot, []), strict=False)):
            if its is not None:
                a, b = (it.double().t() if site.transposed else it.double() for it in (its.a, its.b))
                own = inputs[row].chunk(len(site.widths))[index] if site.own_inputs else inputs[row]
                part = out[row, column : column + width]
                part += its.scale * (b @ (a @ own))
                if its.gain is not None:
                    base = 0 if bias is None else bias[column : column + width].double()
                    part.copy_((part - base) * its.gain.double() + base)
            column += width
    return out


def check(
    widths: tuple[int, ...], depth: int, slots: list[int], dtype: torch.dtype, y_dtype: torch.dtype | None = None,
    bias: bool = False, tile: int = 16, own_inputs: bool = False, transposed: bool = False, gains: bool = False,
) -> None:  # fmt: skip
    site, held = a_site(widths, depth, dtype, own_inputs, transposed, gains)
    x = apart(len(slots), depth * (len(widths) if own_inputs else 1), dtype=dtype)
    y = apart(len(slots), sum(widths), dtype=y_dtype or dtype)
    before, held_bias = y.clone(), torch.randn(sum(widths)).to(dtype) if bias else None
    lora(y, x, site, held, tiles_of(slots, tile), 64, held_bias)
    wanted = expected(before, x, site, held, slots, held_bias)
    rtol = 2**-8 if y.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.double(), wanted, atol=ATOL, rtol=rtol)
    untouched = torch.tensor([slot not in held.by_slot for slot in slots])
    assert torch.equal(y[untouched], before[untouched])


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize(("tokens", "depth", "widths", "tile"), [
    (1, 16, (16,), 16), (13, 7, (33, 3), 16), (100, 24, (5,), 64), (37, 130, (48, 16, 16), 16), (9, 1, (1, 1), 2),
    (70, 64, (300,), 64), (6, 257, (65, 257), 4),
])  # fmt: skip
def test_shapes(
    tokens: int, depth: int, widths: tuple[int, ...], tile: int, popularity: str, dtype: torch.dtype
) -> None:
    check(widths, depth, sorted(pick(popularity, tokens, SLOTS, random.Random(2))), dtype, tile=tile)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("own_inputs", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("depth", "width"), [(12, 20), (33, 7), (128, 64)])
def test_gains_inputs_of_their_own_and_transposed_weights(
    depth: int, width: int, bias: bool, transposed: bool, own_inputs: bool, dtype: torch.dtype
) -> None:
    slots = sorted(pick("uniform", 40, SLOTS, random.Random(4)))
    check((width,) * 3, depth, slots, dtype, bias=bias, own_inputs=own_inputs, transposed=transposed, gains=True)


def test_products_of_bfloat16_are_added_to_float32() -> None:
    """As what gate_up has computed before the activation is."""
    check((20, 20), 33, sorted(pick("uniform", 30, SLOTS, random.Random(5))), torch.bfloat16, torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["x", "a", "b", "gain"])
def test_what_is_not_finite_shows_in_its_own_rows_only(what: str, value: float) -> None:
    site, held = a_site((20, 17), 40, torch.float32, gains=True)
    slots = sorted(pick("uniform", 60, SLOTS, random.Random(4)))
    x, y = torch.randn(60, 40), torch.randn(60, 37)
    tiles, rows = tiles_of(slots, 16), torch.tensor(slots)
    clean = y.clone()
    lora(clean, x, site, held, tiles, 64)
    for slot in sorted(set(slots) & set(held.by_slot)):
        weights = next((it for it in held.by_slot[slot] if it is not None and it.gain is not None), None)
        if weights is None or RANKS[slot] == 0 and what != "gain":
            continue
        row = slots.index(slot)
        at = {"x": x[row], "a": weights.a[-1], "b": weights.b[-1], "gain": weights.gain[-1:]}[what]
        kept = at.clone()
        at.fill_(value)
        got = y.clone()
        lora(got, x, site, held, tiles, 64)
        at.copy_(kept)
        its = torch.arange(60) == row if what == "x" else rows == slot
        assert torch.equal(got[~its], clean[~its])
        assert not bool(got[its].isfinite().all(-1).any())


@pytest.mark.parametrize("tile", [1, 3, 16, 64])
def test_bits_depend_neither_on_threads_nor_on_tiles_nor_on_other_rows(tile: int) -> None:
    site, held = a_site((320, 64, 64), 256, torch.float32, gains=True)
    slots = sorted(pick("zipf", 150, SLOTS, random.Random(4)))
    x, y = torch.randn(150, 256), torch.randn(150, 448)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(y.clone())
            lora(found[-1], x, site, held, tiles_of(slots, tile), 64)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    for row in range(0, 150, 7):
        alone = y[row : row + 1].clone()
        lora(alone, x[row : row + 1], site, held, tiles_of(slots[row : row + 1], 16), 64)
        assert torch.equal(alone[0], found[0][row])


def test_many_adapters_at_once() -> None:
    """A row each of 300."""
    site, held = LoraSite((24,)), SiteAdapters()
    for slot in range(1, 301):
        rank = (1, 4, 8, 17)[slot % 4]
        held.by_slot[slot] = [LoraWeights(torch.randn(rank, 20), torch.randn(24, rank), 1 / slot)]
    attach(site, held, 301, "cpu")
    slots = list(range(301))
    x, y = torch.randn(301, 20), torch.randn(301, 24)
    got = y.clone()
    lora(got, x, site, held, tiles_of(slots, 16), 17)
    torch.testing.assert_close(got.double(), expected(y, x, site, held, slots, None), atol=ATOL, rtol=1e-5)


def test_nothing_to_do() -> None:
    site, held = a_site((8,), 8, torch.float32)
    y = torch.randn(3, 8)
    for tiles in (tiles_of([0, 0, 0], 16), tiles_of([8, 8, 8], 16), tiles_of([2, 2, 2], 16)):
        got = y.clone()
        lora(got, torch.randn(3, 8), site, held, tiles, 64)
        assert torch.equal(got, y)
    nothing = torch.empty(0, 8)
    lora(nothing, nothing, site, held, AdapterTiles([], torch.empty(0, 3, dtype=torch.int32)), 0)


def test_inputs_whose_elements_are_not_next_to_each_other() -> None:
    site, held = a_site((20,), 33, torch.float32)
    slots = [0, 1, 3, 3, 6]
    x, y = torch.randn(33, 5).t(), torch.randn(5, 20)
    got = y.clone()
    lora(got, x, site, held, tiles_of(slots, 16), 64)
    torch.testing.assert_close(got.double(), expected(y, x, site, held, slots, None), atol=ATOL, rtol=1e-5)
