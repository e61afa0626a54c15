"""Which rows of a step belong to which adapter: what every op over adapters reads, whatever it does with them."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

FEW_ROWS = 512  # with more rows than this a step takes so long that a second launch of lora costs nothing to speak of
FEW_TILE_ROWS, MANY_TILE_ROWS = 16, 64


def tile_rows(rows: int) -> int:
    """The most rows of a tile in a step of so many rows.

    Few at decode, where an adapter seldom has more and time goes into reading its weights; many at prefill.
    """
    return FEW_TILE_ROWS if rows <= FEW_ROWS else MANY_TILE_ROWS


class ShapeKey(NamedTuple):
    """What of the adapters' work a step goes through, and how large. A new kind of part adds a field.

    rank: the highest LoRA rank of its adapters at linears, 0 without LoRA. experts: 1 if any replaces experts, else 0.
    expert_rank: the highest LoRA rank inside routed experts, 0 without.
    """

    rank: int = 0
    experts: int = 0
    expert_rank: int = 0

    def joined(self, other: "ShapeKey") -> "ShapeKey":
        """The shape of a step that has the adapters of both."""
        return ShapeKey(*map(max, self, other))

    def covers(self, other: "ShapeKey") -> bool:
        """Whether what was made for steps of this shape, such as a captured graph, serves a step of the other."""
        return all(mine >= its for mine, its in zip(self, other, strict=True))


class Segment(NamedTuple):
    """Rows [start, end) of the step belong to the adapter in `slot`."""

    start: int
    end: int
    slot: int


def cut(spans: Sequence[Segment], tile_rows: int) -> list[tuple[int, int, int]]:
    """Tiles of at most `tile_rows` rows each: (slot, first row, rows)."""
    return [
        (slot, first, min(tile_rows, end - first))
        for start, end, slot in spans
        for first in range(start, end, tile_rows)
    ]


def covering(spans: Sequence[Segment], rows: int) -> list[Segment]:
    """The spans, and between and behind them those of the base: together all rows, in order."""
    segments: list[Segment] = []
    at = 0
    for span in (*spans, Segment(rows, rows, 0)):
        if at < span.start:
            segments.append(Segment(at, span.start, 0))
        if span.start < span.end:
            segments.append(span)
        at = span.end
    return segments


class AdapterTiles(NamedTuple):
    """The rows of a step that have an adapter: as spans for the host, as tiles for kernels.

    Running example, tiles of at most 2 rows: spans [(3, 6, slot 2)] are tiles [[2, 3, 2], [2, 5, 1]].
    """

    spans: Sequence[Segment] | None  # None: only the device knows them
    tiles: Tensor | None = None  # [most, 3] int32: slot, first row, rows
    num_tiles: Tensor | None = None  # [1] int32
    tile_rows: int = 0  # the most rows of a tile
    counters: Tensor | None = None  # [1 + most * slices] int32, zero; left zero


class AdapterRows(NamedTuple):
    """A step's rows by adapter, in order of slot.

    Running example: the base prefills 3 tokens; the adapter in slot 2, a LoRA of rank 16, prefills 3; the one in slot
    5, which replaces experts, decodes 1. The last token of each is sampled.
        slots          [0 0 0 2 2 2 5]
        tiles.spans    [(3, 6, slot 2), (6, 7, slot 5)]
        sampled.spans  [(1, 2, slot 2), (2, 3, slot 5)]    of rows 2, 5 and 6, whose logits are wanted
        shape          (rank 16, experts 1, expert_rank 0)
    """

    # [T] int32, where the step is computed: each token's adapter slot, 0 for the base. None: all are the base's
    slots: Tensor | None
    tiles: AdapterTiles
    sampled: AdapterTiles  # the same for the rows whose logits are wanted
    shape: ShapeKey
    # launch also where no adapter on the device acts: a captured batch is replayed with adapters that came later
    at_all_sites: bool = False
    # `tiles`, and between them those of the base (slot 0), padding included: for what goes over all rows and asks whose
    # each is. None: nobody asks
    cover: AdapterTiles | None = None
