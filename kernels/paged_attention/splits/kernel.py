"""Where parts are kept, and how those who arrive last in their group add them up."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FAN = tl.constexpr(8)  # parts of a group
PROCESSORS = 1  # where there is none to ask, as in the interpreter, which takes programs one by one


class Parts(NamedTuple):
    """Scratch memory for parts of results, float32, and a counter for each part: zero, and left zero."""

    sums: Any  # [parts, ROWS, VALUE]
    maxima: Any  # [parts, ROWS]
    totals: Any  # [parts, ROWS]
    counters: Any  # [parts] int32


@triton.jit
def _at(parts, part, rows, dims, ROWS: tl.constexpr, VALUE: tl.constexpr):
    """Pointers to the sums [rows, dims], maxima [rows] and totals [rows] of a part."""
    row = part * ROWS + rows
    sums = parts.sums + (row[:, None] * VALUE + dims[None, :])
    return sums, parts.maxima + row, parts.totals + row


@triton.jit
def store_part(
    parts, part, rows, dims, accumulated, maximum, total, ROWS: tl.constexpr, VALUE: tl.constexpr
):  # fmt: skip
    """Keep what one program found. Rows from ROWS on are padding of the tile."""
    sums, maxima, totals = _at(parts, part, rows, dims, ROWS, VALUE)
    kept = rows < ROWS
    tl.store(sums, accumulated, mask=kept[:, None])
    tl.store(maxima, maximum, mask=kept)
    tl.store(totals, total, mask=kept)


@triton.jit
def arrives_last(parts, part, members):
    """Whether all others of the group whose counter is that of `part` have arrived. If so the counter is zero again.

    Who is alone in a group counts nothing: where a level's last group has one member, its counter would be that of the
    next tile's first part. With two or more there are parts enough for it to be the tile's own.
    """
    tl.debug_barrier()  # all threads have stored before one of them says so, or reads what others of them stored
    is_last = members == 1
    if members > 1:
        arrived = tl.atomic_add(parts.counters + part, 1, sem="acq_rel")
        is_last = arrived == members - 1
        if is_last:
            tl.store(parts.counters + part, 0)
    return is_last


@triton.jit
def add_totals(parts, first, step, members, rows, ROWS: tl.constexpr):
    """(maximum, total) of parts first, first + step, ..; at most FAN.

    Read past the first-level cache, as sums are: other processors wrote them.
    """
    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    for index in tl.static_range(FAN):
        maxima = parts.maxima + (first + index * step) * ROWS + rows
        mask = rows < tl.where(members > index, ROWS, 0)
        its = tl.load(maxima, mask=mask, other=float("-inf"), cache_modifier=".cg")
        maximum = tl.maximum(maximum, its)
    total = tl.zeros((ROWS,), tl.float32)
    for index in tl.static_range(FAN):
        part, mask = first + index * step, rows < tl.where(members > index, ROWS, 0)
        its = tl.load(parts.totals + part * ROWS + rows, mask=mask, other=0.0, cache_modifier=".cg")
        total += its * _rescale(parts, part, maximum, rows, mask, ROWS)
    return maximum, total


@triton.jit
def _rescale(parts, part, maximum, rows, mask, ROWS: tl.constexpr):
    """What brings a part to the highest of all maxima. Rows of all parts may have seen no key."""
    its = tl.load(parts.maxima + part * ROWS + rows, mask=mask, other=float("-inf"), cache_modifier=".cg")
    return tl.exp2(its - tl.where(maximum == float("-inf"), 0.0, maximum))


@triton.jit
def add_sums(
    parts, first, step, members, maximum, rows, dims, ROWS: tl.constexpr, VALUE: tl.constexpr, SLICE: tl.constexpr
):  # fmt: skip
    """Columns `dims` of the sums, [ROWS, SLICE]. No load waits for another."""
    added = tl.zeros((ROWS, SLICE), tl.float32)
    for index in tl.static_range(FAN):
        part, mask = first + index * step, rows < tl.where(members > index, ROWS, 0)
        sums, _, _ = _at(parts, part, rows, dims, ROWS, VALUE)
        its = tl.load(sums, mask=mask[:, None], other=0.0, cache_modifier=".cg")
        added += its * _rescale(parts, part, maximum, rows, mask, ROWS)[:, None]
    return added


@triton.jit
def store_sums(parts, part, added, rows, dims, ROWS: tl.constexpr, VALUE: tl.constexpr):
    tl.debug_barrier()  # all threads have read before one of them writes in the same place
    sums, _, _ = _at(parts, part, rows, dims, ROWS, VALUE)
    tl.store(sums, added)


@triton.jit
def store_totals(parts, part, maximum, total, rows, ROWS: tl.constexpr):
    tl.debug_barrier()
    _, maxima, totals = _at(parts, part, rows, rows, ROWS, 1)
    tl.store(maxima, maximum)
    tl.store(totals, total)


def slice_of(value: int, rows: int, num_warps: int) -> int:
    """Columns of a result that are added up at once: so that a thread has 8 numbers of each of FAN parts."""
    return min(value, 8 * 32 * num_warps // rows)


@lru_cache
def processors(device: torch.device) -> int:
    cuda = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if cuda else PROCESSORS


def scratch(parts: int, rows: int, value: int, counters: Tensor) -> Parts:
    """parts: how many there may be; counters for as many."""
    assert parts <= counters.numel()
    return Parts(
        torch.empty(parts, rows, value, dtype=torch.float32, device=counters.device),
        torch.empty(parts, rows, dtype=torch.float32, device=counters.device),
        torch.empty(parts, rows, dtype=torch.float32, device=counters.device),
        counters,
    )
