"""What adapters add to a product, added by its reader: what a launch of lora and that reader give.

To the bit, in rows of the base too, but for two things. Of what is normed the sum of squares is taken in other parts,
in every row; and in float32 products of other widths may add up the ranks in another order, in rows of adapters.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.adapter_rows import AdapterTiles, Segment, covering, cut
from kernels.gated import Activation
from kernels.gated import kernel as gated_kernel
from kernels.lora import Delta, LoraSite, LoraWeights, SiteAdapters
from kernels.lora import kernel as lora_kernel
from kernels.rms_norm import kernel as norm_kernel
from kernels.rope_store import HeadNorms, Heads
from kernels.rope_store import kernel as rope_store_kernel
from tests.support.kernel_device import DEVICE
from tests.support.lora_tables import attach

pytestmark = pytest.mark.usefixtures("poisoned_memory")

RANKS = {1: 3, 2: 20, 4: 16}  # slot 3 has no LoRA here; slot 0 is the base
SPANS = [Segment(1, 2, 1), Segment(2, 5, 2), Segment(5, 6, 3), Segment(6, 7, 4)]
ROWS, DEPTH, TILE, MOST_RANK = 8, 24, 16, 24
LONG = [Segment(1, 19, 2), Segment(19, 21, 4)]  # more rows of one slot than a tile has


class Case:
    """A site of these widths, its input, the product that lacks what adapters add, and what lora makes of it."""

    def __init__(
        self, widths: tuple[int, ...], dtype: torch.dtype, has_bias: bool, spans: Sequence[Segment] = SPANS,
        rows: int = ROWS,
    ) -> None:  # fmt: skip
        torch.manual_seed(1)
        self.site, self.adapters = LoraSite(widths), SiteAdapters()
        for slot, rank in RANKS.items():
            self.adapters.by_slot[slot] = [
                None if len(widths) > 1 and index == slot % len(widths) else LoraWeights(
                    self.randn(rank, DEPTH, dtype=dtype), self.randn(width, rank, dtype=dtype), 0.1 * slot,
                    torch.rand(width, device=DEVICE) + 0.5 if slot == 2 else None)
                for index, width in enumerate(widths)
            ]  # fmt: skip
        attach(self.site, self.adapters, 5)
        self.bias = self.randn(sum(widths), dtype=dtype) if has_bias else None
        self.x, self.y = self.randn(rows, DEPTH, dtype=dtype), self.randn(rows, sum(widths), dtype=dtype)
        self.counters = torch.zeros(40, dtype=torch.int32, device=DEVICE)
        tiles, cover = (self.tiles(it) for it in (spans, covering(spans, rows)))
        self.finished = self.y.clone()
        lora_kernel.lora(self.finished, self.x, self.site, self.adapters, tiles, MOST_RANK, self.bias, True)
        z = lora_kernel.shrunk(self.x, self.adapters, tiles, MOST_RANK)
        assert self.adapters.table is not None and self.adapters.offsets is not None
        self.delta = Delta(z, self.adapters.table, self.adapters.offsets, cover, self.bias)

    @staticmethod
    def randn(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape).to(DEVICE, dtype)

    def tiles(self, spans: Sequence[Segment]) -> AdapterTiles:
        rows = [*cut(spans, TILE), (10**6, 10**6, 10**6)]  # behind the last tile nothing is looked at
        tiles, count = (torch.tensor(it, dtype=torch.int32, device=DEVICE) for it in (rows, [len(rows) - 1]))
        return AdapterTiles(spans, tiles, count, TILE, self.counters)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one block in every direction, and sums that are not all in one order."""
    monkeypatch.setattr(lora_kernel, "_blocks", lambda *_: (16, 16, 4))
    monkeypatch.setattr(lora_kernel, "splits_of", lambda *_, **__: 2)
    monkeypatch.setattr(gated_kernel, "_ADAPTED_BYTES", 64)
    monkeypatch.setattr(norm_kernel, "_ADAPTED_COLUMNS", 16)


def activate(case: Case, y: Tensor, delta: Delta | None) -> tuple[Tensor, ...]:
    return (gated_kernel.gated(y, Activation(), False, delta),)


def add_and_norm(case: Case, y: Tensor, delta: Delta | None) -> tuple[Tensor, ...]:
    rows, width = y.shape
    residual, weight = torch.arange(rows * width).view(rows, width) / 400, 1 + torch.arange(width) / 40
    out = norm_kernel.add_rms_norm(y, residual.to(DEVICE, y.dtype), weight.to(DEVICE, y.dtype), 1e-5, delta=delta)
    assert not case.counters.any()
    return out


HEADS = Heads(2, 1, 12, 8, 8)  # no power of two, a part of each head rotated, narrower values


def turn_and_store(case: Case, y: Tensor, delta: Delta | None, has_norms: bool = False) -> tuple[Tensor, ...]:
    rows = torch.arange(len(y), device=DEVICE)
    angles = torch.arange(8 * len(y), device=DEVICE).view(1, -1, 8) / 9
    weight = (1 + torch.arange(12) / 12).to(DEVICE, y.dtype)
    caches = [torch.zeros(10, 4, 1, width, dtype=y.dtype, device=DEVICE) for width in (12, 8)]
    slots = rows.int().masked_fill(rows == 3, -1)
    norms = HeadNorms(weight, weight, 1e-5) if has_norms else None
    query = rope_store_kernel.rope_store(y, HEADS, angles.cos().to(y.dtype), angles.sin().to(y.dtype), caches[0],
                                         caches[1], slots, norms, delta)  # fmt: skip
    return query, *caches


READERS: dict[str, tuple[tuple[int, ...], Callable[..., tuple[Tensor, ...]]]] = {
    "gated": ((24, 24), activate), "add_rms_norm": ((24,), add_and_norm), "rope_store": (HEADS.widths, turn_and_store),
    "rope_store with norms": (HEADS.widths, partial(turn_and_store, has_norms=True)),
}  # fmt: skip
IN_PARTS = "add_rms_norm", "rope_store with norms"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_a_reader_adds_what_lora_would_have_added(reader: str, dtype: torch.dtype) -> None:
    widths, _ = READERS[reader]
    compare(reader, Case(widths, dtype, has_bias=dtype is torch.float32))


@pytest.mark.parametrize("reader", [it for it in READERS if it not in IN_PARTS])
def test_a_slot_with_more_rows_than_a_tile(reader: str) -> None:
    compare(reader, Case(READERS[reader][0], torch.bfloat16, False, LONG, rows=22))


def compare(reader: str, case: Case) -> None:
    _, read = READERS[reader]
    dtype = case.y.dtype
    assert not torch.equal(case.finished, case.y)
    expected, got = read(case, case.finished, None), read(case, case.y, case.delta)
    for one, other in zip(got, expected, strict=True):
        if reader in IN_PARTS and one is not got[-1]:  # what is normed: sums of squares are taken in other parts
            torch.testing.assert_close(one, other, atol=2e-6, rtol=2**-7 if dtype is torch.bfloat16 else 1e-6)
        elif reader == "rope_store" and dtype is torch.float32:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-6)
            is_base = (case.finished == case.y).all(1)
            by_row = [it.flatten(0, -3)[: len(is_base)][is_base] for it in (one, other)]  # KV slots are rows
            assert is_base.sum() >= 3 and torch.equal(*by_row)
        else:
            assert torch.equal(one, other)


@pytest.mark.parametrize("reader", ["gated", "add_rms_norm", "rope_store"])
def test_schemas(reader: str) -> None:
    case = Case(READERS[reader][0], torch.float32, True, SPANS[:1])
    cos = torch.randn(1, ROWS, 8, device=DEVICE)
    caches = [torch.zeros(10, 4, 1, width, device=DEVICE) for width in (12, 8)]
    slots = torch.arange(ROWS, dtype=torch.int32, device=DEVICE)
    op, arguments = {
        "gated": (gated_kernel._gated_adapted, (case.y, 0, 1.0, 0.0)),
        "add_rms_norm": (norm_kernel._add_rms_norm_adapted,
                         (case.y, case.y.clone(), torch.ones(24, device=DEVICE), 1e-5, 0.0, True, case.counters)),
        "rope_store": (rope_store_kernel._rope_store_adapted,
                       (case.y, list(HEADS), cos, cos, *caches, slots, None, None, 0.0, 0.0, True)),
    }[reader]  # fmt: skip
    checked: Any = op
    torch.library.opcheck(checked.registered, (*arguments, *case.delta.tensors),
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip
