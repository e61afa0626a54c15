"""What lora reads: where it acts in the model, and the adapters' weights there."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class LoraWeights(NamedTuple):
    """One adapter's for one slice: a [rank, in], b [out, rank]; y += scale * b @ (a @ x).

    In routed experts a [M, rank, in] and b [M, out, rank]: a matrix an expert, which lies in one piece. Between those
    of two experts there may be any distance, none where all share one.
    a begins at a multiple of 16 bytes, since kernels read it in vectors; so does each expert's if x has such rows.
    gain [out] float32 (DoRA, arXiv 2402.09353): y = gain * (base + delta) + bias, where base is without the bias. Not
    in experts.
    """

    a: Tensor
    b: Tensor
    scale: float
    gain: Tensor | None = None

    def of_expert(self, expert: int) -> "LoraWeights":
        return LoraWeights(self.a[expert], self.b[expert], self.scale)


# what an adapter has for one linear -> (slice, weights) at a site
Split = Callable[[LoraWeights], Sequence[tuple[int, LoraWeights]]]


@dataclass(frozen=True, eq=False)
class LoraSite:
    """A place where LoRA acts: one linear, or several that read the same input and are computed as one.

    widths: output features of each slice.
    own_inputs: slice i reads the i-th part of x's columns, not all of them. The heads of absorbed attention do.
    transposed: weights are stored as a [in, rank] and b [rank, out]. So they are where absorbed attention uses a
        projection's weights the other way round.
    experts: M where it is a matrix (or two) of each of M routed experts, else 0.
    """

    widths: tuple[int, ...]
    own_inputs: bool = False
    transposed: bool = False
    experts: int = 0


@dataclass(eq=False)
class SiteAdapters:
    """What the adapters have for one site. Ops read it; whoever owns the weights writes it.

    by_slot[slot][i]: what the adapter in the slot adds to slice i, if anything.
    table [slots + 1, slices, TABLE_FIELDS] int64: the same for kernels, with rows as `table_rows` makes them. It may be
    a view of one table for all sites, so that an adapter is installed with one copy.
    offsets [slices + 1] int32, on the device of the table: first column of each slice, and the end.
    """

    by_slot: dict[int, list[LoraWeights | None]] = field(default_factory=dict)
    table: Tensor | None = None
    offsets: Tensor | None = None


class Field(IntEnum):
    """What the numbers of a table's row mean.

    Slot 0 is the base and has no weights. There A is 1 if any adapter acts at the site and 0 if none does, so that a
    launch ends at once where nothing is to be done.
    NEXT is reserved for slots that hold several weighted adapters: the next row of the same slot, or 0 for none. One
    program would walk them, since two programs that add to the same rows of y would race. Today it is always 0.
    In routed experts, A and B are those of expert 0, and from one expert's to the next's it is A_STRIDE and B_STRIDE
    elements.
    """

    A = 0  # addresses
    B = 1
    GAIN = 2  # 0: none
    RANK = 3
    SCALE = 4  # the float's bits
    NEXT = 5
    A_STRIDE = 6
    B_STRIDE = 7


TABLE_FIELDS = 8  # 64 bytes, a cache line
NOTHING = (0,) * TABLE_FIELDS  # the row of a slot that has no weights for a slice
_ACTS = (1, *NOTHING[1:])


def table_row(weights: LoraWeights, transposed: bool = False) -> tuple[int, ...]:
    """TABLE_FIELDS numbers, in the order of Field."""
    row = list(NOTHING)
    row[Field.A], row[Field.B] = weights.a.data_ptr(), weights.b.data_ptr()
    row[Field.GAIN] = 0 if weights.gain is None else weights.gain.data_ptr()
    row[Field.RANK] = weights.a.shape[-1 if transposed else -2]
    if weights.a.dim() == 3:
        row[Field.A_STRIDE], row[Field.B_STRIDE] = weights.a.stride(0), weights.b.stride(0)
    (row[Field.SCALE],) = struct.unpack("<i", struct.pack("<f", weights.scale))
    return tuple(row)


def table_rows(site: LoraSite, adapters: SiteAdapters, slot: int) -> list[tuple[int, ...]]:
    """What the table says of `slot`: a row for each slice. Those of slot 0 change with any other's."""
    if slot == 0:
        return [_ACTS if adapters.by_slot else NOTHING] * len(site.widths)
    held = adapters.by_slot.get(slot, [None] * len(site.widths))
    assert site.own_inputs or all(it is None or _is_aligned(site, it.a) for it in held)
    return [NOTHING if weights is None else table_row(weights, site.transposed) for weights in held]


def _is_aligned(site: LoraSite, a: Tensor) -> bool:
    """What is promised of a LoraWeights' a."""
    depth = a.shape[-2 if site.transposed else -1] * a.itemsize
    return a.data_ptr() % 16 == 0 and (a.dim() < 3 or depth % 16 > 0 or a.stride(0) * a.itemsize % 16 == 0)
