"""What lora reads: the adapters' weights at one place of the model, and the rows of a step that each adapter has."""

import struct
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

FEW_ROWS = 512  # beyond so many rows a second launch costs nothing that one would notice
FEW_TILE_ROWS, MANY_TILE_ROWS = 16, 64


def tile_rows(rows: int) -> int:
    """The most rows of a tile: few at decode, where adapters differ and bytes count, many at prefill."""
    return FEW_TILE_ROWS if rows <= FEW_ROWS else MANY_TILE_ROWS


class LoraWeights(NamedTuple):
    """a [rank, in], b [out, rank]: y += scale * b @ (a @ x). a begins at a multiple of 16 bytes.

    gain [out] float32 (DoRA): y = gain * (base + delta) + bias, base being without the bias.
    """

    a: Tensor
    b: Tensor
    scale: float
    gain: Tensor | None = None


# what an adapter has for one linear -> (slice, weights) at a site
Split = Callable[[LoraWeights], Sequence[tuple[int, LoraWeights]]]


class LoraSite:
    """A place where LoRA acts: one linear, or several that read the same input and are computed as one.

    widths: output features of each slice. `by_slot[slot][i]`: what the adapter in `slot` adds to slice i, if anything.
    `table` is the same for kernels: [slots + 1, slices, 4] int64 on the device, rows as `table_row` makes them; a view
    of one table for all sites, so that an adapter is installed with one copy. No adapter is in slot 0, so its first
    number is free to say whether any acts here; where none does, a launch ends at once.

    own_inputs: slice i reads the i-th part of x's columns, not all of them (the heads of absorbed attention).
    transposed: a is [in, rank] and b [rank, out].
    """

    def __init__(self, widths: Sequence[int], own_inputs: bool = False, transposed: bool = False) -> None:
        self.widths = tuple(widths)
        self.own_inputs, self.transposed = own_inputs, transposed
        self.by_slot: dict[int, list[LoraWeights | None]] = {}
        self.table: Tensor | None = None
        self.offsets: Tensor | None = None  # [slices + 1] int32 on the device: first column of each slice, and the end

    def put(self, slot: int, slice_index: int, weights: LoraWeights) -> None:
        """The host's form; whoever owns the table copies `rows` of the slot, and those of slot 0, there."""
        assert slot > 0
        self.by_slot.setdefault(slot, [None] * len(self.widths))[slice_index] = weights

    def remove(self, slot: int) -> None:
        self.by_slot.pop(slot, None)

    def attach(self, table: Tensor) -> None:
        """Give it the device's form: its columns of the table of all sites."""
        ends = list(accumulate(self.widths, initial=0))
        self.table, self.offsets = table, torch.tensor(ends, dtype=torch.int32, device=table.device)

    def rows(self, slot: int) -> list[tuple[int, int, int, int]]:
        """What the table says of `slot`: [slices] rows."""
        if slot == 0:
            return [(int(bool(self.by_slot)), 0, 0, 0)] * len(self.widths)
        adapter = self.by_slot.get(slot, [None] * len(self.widths))
        assert self.own_inputs or all(it is None or it.a.data_ptr() % 16 == 0 for it in adapter)
        return [_NOTHING if weights is None else table_row(weights, self.transposed) for weights in adapter]


_NOTHING = (0, 0, 0, 0)


def table_row(weights: LoraWeights, transposed: bool = False) -> tuple[int, int, int, int]:
    """Addresses of a, b and the gain (0: none), and rank and scale in one word: rank below, the float's bits above."""
    (scale_bits,) = struct.unpack("<i", struct.pack("<f", weights.scale))
    gain = 0 if weights.gain is None else weights.gain.data_ptr()
    return weights.a.data_ptr(), weights.b.data_ptr(), gain, scale_bits << 32 | weights.a.shape[1 if transposed else 0]


class Segment(NamedTuple):
    """Rows [start, end) of the step belong to the adapter in `slot`."""

    start: int
    end: int
    slot: int


class Segments(NamedTuple):
    """The rows of a step that have a LoRA adapter: as spans for the host, as tiles for kernels.

    Running example, tiles of at most 2 rows: spans [(3, 6, slot 2)] are tiles [[2, 3, 2], [2, 5, 1]].
    """

    spans: Sequence[Segment]
    tiles: Tensor | None = None  # [most, 3] int32: slot, first row, rows
    num_tiles: Tensor | None = None  # [1] int32
    tile_rows: int = 0  # the most rows of a tile
    max_rank: int = 0  # no adapter of the batch has more
    counters: Tensor | None = None  # [1 + most * slices] int32, zero; left zero
    at_all_sites: bool = False  # of a captured batch: it is replayed with adapters that were not there yet

    def act_at(self, site: LoraSite) -> bool:
        """Whether a launch may have work at this site. What a captured batch holds is read from the device."""
        return self.at_all_sites or (bool(site.by_slot) and (bool(self.spans) or self.tiles is not None))


def cut(spans: Sequence[Segment], tile_rows: int) -> list[tuple[int, int, int]]:
    """Tiles of at most `tile_rows` rows each: (slot, first row, rows)."""
    return [
        (slot, first, min(tile_rows, end - first))
        for start, end, slot in spans
        for first in range(start, end, tile_rows)
    ]
