"""Triton form of shrink and expand, which the launches of lora call.

Names of constants: K is the depth, the columns of x that a slice reads; SL the number of slices; SPLITS that of parts
of the depth; TILE the rows of a tile; BK, RB and BN are columns of x, ranks and columns of y at a time; DT is the type
of the weights. EXPERTS: how many routed experts a slot has matrices for, whose tiles have entries (slot * EXPERTS +
expert) in the place of slots; 0 outside routed experts.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.compiled.kernel import dot, open_tile
from kernels.lora.site import TABLE_FIELDS, Field

_FIELDS = tl.constexpr(TABLE_FIELDS)
_A, _B, _GAIN = tl.constexpr(int(Field.A)), tl.constexpr(int(Field.B)), tl.constexpr(int(Field.GAIN))
_RANK, _SCALE = tl.constexpr(int(Field.RANK)), tl.constexpr(int(Field.SCALE))
_A_STRIDE, _B_STRIDE = tl.constexpr(int(Field.A_STRIDE)), tl.constexpr(int(Field.B_STRIDE))


class Table(NamedTuple):
    """Where the adapters' weights for a site are: table and offsets of SiteAdapters. In a kernel, pointers."""

    rows: Any  # [slots, slices, TABLE_FIELDS] int64
    stride: Any  # of slots
    offsets: Any  # [slices + 1] int32


class Pending(NamedTuple):
    """What adapters add to a product, and have not added yet: a Delta (kernels/lora/delta.py), as pointers."""

    z: Any  # [SPLITS, slices, T, max_rank] float32: what shrinks have left
    bias: Any  # [sum of widths]: what the product has added already; read if HAS_BIAS
    rows: Any  # as in Table, like the next two
    stride: Any
    offsets: Any
    tiles: Any  # as in Tiles, like the next: over all rows of the step, the base's too
    num_tiles: Any


@triton.jit
def _entry(table, entry, part, EXPERTS: tl.constexpr, DT: tl.constexpr):
    """Of an adapter's slice, and in experts of one of its experts: a and b (pointers), gain's address, rank, scale."""
    slot = entry // EXPERTS if EXPERTS > 0 else entry
    row = table.rows + slot.to(tl.int64) * table.stride + part * _FIELDS
    rank = tl.load(row + _RANK).to(tl.int32)
    scale = tl.load(row + _SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    a = tl.load(row + _A).to(tl.pointer_type(DT))
    b = tl.load(row + _B).to(tl.pointer_type(DT))
    if EXPERTS > 0:
        expert = (entry % EXPERTS).to(tl.int64)  # all experts' matrices together may pass 2^31 elements
        a += expert * tl.load(row + _A_STRIDE)
        b += expert * tl.load(row + _B_STRIDE)
        gain = tl.cast(0, tl.int64)
    else:
        gain = tl.load(row + _GAIN)
    return a, b, gain, rank, scale


@triton.jit
def _shrunk_at(z, split, part, rows, ranks, T, max_rank, SL: tl.constexpr):
    """Pointers [rows, ranks] into z [SPLITS, SL, T, max_rank] float32: what shrinks leave for expands."""
    return z + ((split * SL + part) * T + rows)[:, None] * max_rank + ranks[None, :]


@triton.jit
def shrink(
    x, stride_x, z, table, tiles, tile, part, split, T, max_rank,
    K: tl.constexpr, CHOICES: tl.constexpr, OWN: tl.constexpr, ALIGNED: tl.constexpr, BK: tl.constexpr,
    EXPERTS: tl.constexpr, TRANSPOSED: tl.constexpr, SL: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
    RB: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """z[split, part, rows, :rank] = x[rows] @ a^T over this split of the depth K.

    CHOICES above 0: x is read at pairs[rows] // CHOICES. OWN: a slice reads its own K columns of x. ALIGNED: every a
    begins at a multiple of 16 bytes.
    """
    if OWN:
        x += part * K
    entry, start, count = open_tile(tiles, tile)
    m = tl.arange(0, TILE)
    row_mask = m < count
    a, _, _, rank, _ = _entry(table, entry, part, EXPERTS, DT)
    if ALIGNED:  # an address out of a table says nothing of itself, and would be read an element at a time
        a = tl.multiple_of(a, 16)
    rows = (start + m).to(tl.int64)
    depth: tl.constexpr = ((K + SPLITS - 1) // SPLITS + BK - 1) // BK * BK  # of one split, whole blocks
    if CHOICES > 0:
        read = (tl.load(tiles.pairs + rows, mask=row_mask, other=0) // CHOICES).to(tl.int64)
    else:
        read = rows
    k = tl.arange(0, BK)
    r = tl.arange(0, RB)
    for first_rank in range(0, rank, RB):
        ranks = first_rank + r
        total = tl.zeros((TILE, RB), tl.float32)
        for first in range(split * depth, tl.minimum(split * depth + depth, K), BK):
            deep = first + k
            seen = tl.load(x + read[:, None] * stride_x + deep[None, :],
                           mask=row_mask[:, None] & (deep < K)[None, :], other=0.0)  # fmt: skip
            # of 32 bits: at rank 4,096 and a depth of 65,536 one a has 2^28 elements
            weight_at = deep[:, None] * rank + ranks[None, :] if TRANSPOSED else ranks[None, :] * K + deep[:, None]
            weight = tl.load(a + weight_at, mask=(ranks < rank)[None, :] & (deep < K)[:, None], other=0.0)  # fmt: skip
            total = dot(seen, weight, total)
        z_at = _shrunk_at(z, split, part, rows, ranks, T, max_rank, SL)
        tl.store(z_at, total, mask=row_mask[:, None] & (ranks < rank)[None, :])
    return rank


@triton.jit
def _weights_of(b, first_rank, rank, width, n, column_mask, TRANSPOSED: tl.constexpr, RB: tl.constexpr):
    """b^T [RB, columns] of the ranks from first_rank on; zeros beyond the last."""
    ranks = first_rank + tl.arange(0, RB)
    wide = n[None, :].to(tl.int64)
    # ranks * width is of 32 bits, which at rank 4,096 is enough for half a million columns; the rest of 64
    weight_at = ranks[:, None] * width + wide if TRANSPOSED else wide * rank + ranks[:, None]
    return tl.load(b + weight_at, mask=column_mask[None, :] & (ranks < rank)[:, None], other=0.0)


@triton.jit
def _expanded(
    total, first_rank, weight, z, rank, part, rows, row_mask, T, max_rank,
    SL: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, RB: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """total [TILE, columns] + z @ weight of RB ranks, with z summed over the splits."""
    ranks = first_rank + tl.arange(0, RB)
    z_mask = row_mask[:, None] & (ranks < rank)[None, :]
    shrunk = tl.zeros((TILE, RB), tl.float32)
    for split in tl.static_range(SPLITS):  # always in this order
        z_at = _shrunk_at(z, split, part, rows, ranks, T, max_rank, SL)
        shrunk += tl.load(z_at, mask=z_mask, other=0.0, cache_modifier=".cg")
    return dot(shrunk.to(DT), weight, total)


@triton.jit
def _gained(out, gain_address, bias, n, column_mask, HAS_BIAS: tl.constexpr):
    """With the gain that is at this address, 0 for none; bias: where the slice's begins."""
    if gain_address != 0:
        gain = tl.load(gain_address.to(tl.pointer_type(tl.float32)) + n, mask=column_mask, other=0.0)[None, :]
        if HAS_BIAS:
            held = tl.load(bias + n, mask=column_mask, other=0.0).to(tl.float32)[None, :]
            out = (out - held) * gain + held
        else:
            out = out * gain
    return out


@triton.jit
def tile_of(pending, tile, TILE: tl.constexpr):
    """(slot, rows [TILE], whether there is such a row) of a tile of a Pending by its number."""
    at = pending.tiles + tile * 3
    m = tl.arange(0, TILE)
    return tl.load(at), (tl.load(at + 1) + m).to(tl.int64), m < tl.load(at + 2)


@triton.jit
def adapted(
    prior, pending, slot, part, rows, row_mask, n, column_mask, T, max_rank,
    HAS_BIAS: tl.constexpr, SL: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, BN: tl.constexpr,
    RB: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """What a linear's product becomes by the slot's adapter, for the consumer of the product.

    prior [TILE, BN] float32: what the product holds at these rows and columns n of slice `part`. Returned is what a
    launch of lora would leave there, with its rounding, as float32. pending: a Pending.
    """
    _, b, gain_address, rank, scale = _entry(pending, slot, part, 0, DT)
    out = prior
    if (rank > 0) | (gain_address != 0):
        begin = tl.load(pending.offsets + part)
        width = tl.load(pending.offsets + part + 1) - begin
        total = tl.zeros((TILE, BN), tl.float32)
        for first_rank in range(0, rank, RB):
            weight = _weights_of(b, first_rank, rank, width, n, column_mask, False, RB)
            total = _expanded(total, first_rank, weight, pending.z, rank, part, rows, row_mask, T, max_rank,
                              SL, SPLITS, TILE, RB, DT)  # fmt: skip
        out = _gained(prior + total * scale, gain_address, pending.bias + begin, n, column_mask, HAS_BIAS)
        out = out.to(DT).to(tl.float32)
    return out


@triton.jit
def expand(
    y, stride_y, z, bias, table, tiles, counters, tile, part, column_block, T, max_rank,
    SCATTERS: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr, WAITS: tl.constexpr, EXPERTS: tl.constexpr,
    TRANSPOSED: tl.constexpr, SL: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, RB: tl.constexpr,
    DT: tl.constexpr,
):  # fmt: skip
    """y[rows, columns] += scale * z @ b^T, with z summed over the splits; then the gain, if there is one.

    SCATTERS: y is written at pairs[rows]. WAITS: for the shrinks of this tile and slice, which count themselves at
    counters[1 + tile * SL + part]; else they were done by an earlier launch.
    """
    begin = tl.load(table.offsets + part)
    width = tl.load(table.offsets + part + 1) - begin
    if column_block * BN < width:
        entry, start, count = open_tile(tiles, tile)
        m = tl.arange(0, TILE)
        row_mask = m < count
        _, b, gain_address, rank, scale = _entry(table, entry, part, EXPERTS, DT)
        if (rank > 0) | (gain_address != 0):
            rows = (start + m).to(tl.int64)
            n = column_block * BN + tl.arange(0, BN)
            column_mask = n < width
            mask = row_mask[:, None] & column_mask[None, :]
            if SCATTERS:
                written = tl.load(tiles.pairs + rows, mask=row_mask, other=0).to(tl.int64)
            else:
                written = rows
            y_at = y + written[:, None] * stride_y + (begin + n)[None, :]
            prior = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)  # under way before the wait
            # so are the weights of the first ranks; in experts and in float32 there are not the registers for it
            EARLY: tl.constexpr = RB if WAITS and EXPERTS == 0 and b.dtype.element_ty.primitive_bitwidth < 32 else 0
            if EARLY > 0:
                weight = _weights_of(b, 0, rank, width, n, column_mask, TRANSPOSED, RB)
            if WAITS:
                if rank > 0:
                    while tl.atomic_add(counters + 1 + tile * SL + part, 0, sem="acquire", scope="gpu") < SPLITS:
                        pass
                    tl.debug_barrier()
            total = tl.zeros((TILE, BN), tl.float32)
            if EARLY > 0:
                total = _expanded(total, 0, weight, z, rank, part, rows, row_mask, T, max_rank,
                                  SL, SPLITS, TILE, RB, DT)  # fmt: skip
            for first_rank in range(EARLY, rank, RB):
                weight = _weights_of(b, first_rank, rank, width, n, column_mask, TRANSPOSED, RB)
                total = _expanded(total, first_rank, weight, z, rank, part, rows, row_mask, T, max_rank,
                                  SL, SPLITS, TILE, RB, DT)  # fmt: skip
            out = _gained(prior + total * scale, gain_address, bias + begin, n, column_mask, HAS_BIAS)
            tl.store(y_at, out.to(y.dtype.element_ty), mask=mask)
