"""How many splits there are, where their parts are kept, and how the last program to arrive adds them up.

The parts are always added in the same order, whoever arrives last, so the result does not depend on timing.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

MAX_SPLITS = 32  # one program adds them up
LEAST_TILES = tl.constexpr(4)  # of keys in a split
PROCESSORS = 132  # where there is none to ask: an H100 or H200


class Parts(NamedTuple):
    """Scratch memory for the results of all splits, float32. Part p * splits + s is that of split s of program p."""

    sums: Any  # [parts, ROW_HEADS, VALUE]
    maxima: Any  # [parts, ROW_HEADS]
    totals: Any  # [parts, ROW_HEADS]


@triton.jit
def _at(parts, part, rows, dims, ROW_HEADS: tl.constexpr, VALUE: tl.constexpr):
    """Pointers to the sums [rows, dims], maxima [rows] and totals [rows] of a part."""
    row = part * ROW_HEADS + rows
    sums = parts.sums + row.to(tl.int64)[:, None] * VALUE + dims[None, :]
    return sums, parts.maxima + row, parts.totals + row


@triton.jit
def store_part(
    parts, part, rows, dims, accumulated, maximum, total, ROW_HEADS: tl.constexpr, VALUE: tl.constexpr
):  # fmt: skip
    """Keep what one split found. Rows from ROW_HEADS on are padding of the tile."""
    sums, maxima, totals = _at(parts, part, rows, dims, ROW_HEADS, VALUE)
    kept = rows < ROW_HEADS
    tl.store(sums, accumulated, mask=kept[:, None])
    tl.store(maxima, maximum, mask=kept)
    tl.store(totals, total, mask=kept)


@triton.jit
def add_parts(
    parts, first_part, count, rows, dims,
    ROW_HEADS: tl.constexpr, VALUE: tl.constexpr, BLOCK_M: tl.constexpr, NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """(accumulated, maximum, total) of `count` parts. Read past the first-level cache: other processors wrote them."""
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    accumulated = tl.zeros((BLOCK_M, VALUE), tl.float32)
    kept = rows < ROW_HEADS
    for other in tl.range(0, count, num_stages=NUM_STAGES):
        sums, maxima, totals = _at(parts, first_part + other, rows, dims, ROW_HEADS, VALUE)
        part_maximum = tl.load(maxima, mask=kept, other=0.0, cache_modifier=".cg")
        part_total = tl.load(totals, mask=kept, other=0.0, cache_modifier=".cg")
        part_sums = tl.load(sums, mask=kept[:, None], other=0.0, cache_modifier=".cg")
        highest = tl.maximum(maximum, part_maximum)
        rescale = tl.exp2(maximum - highest)
        part_rescale = tl.exp2(part_maximum - highest)
        maximum = highest
        total = total * rescale + part_total * part_rescale
        accumulated = accumulated * rescale[:, None] + part_sums * part_rescale[:, None]
    return accumulated, maximum, total


@lru_cache
def programs_wanted(device: torch.device) -> int:
    """Two a processor."""
    cuda = device.type == "cuda"
    return 2 * (torch.cuda.get_device_properties(device).multi_processor_count if cuda else PROCESSORS)


def num_splits(programs: int, wanted: int, counters: int, most_tiles: int) -> int:
    """Of each program's keys. It follows from shapes alone, so that a captured launch holds for any lengths.

    programs: without splits; each needs one of the `counters`. wanted: programs that fill the device. most_tiles: of
    keys, in the longest sequence that the block tables have room for.
    """
    return max(1, min(wanted // programs, MAX_SPLITS, most_tiles)) if programs <= counters else 1


def scratch(parts: int, row_heads: int, value: int, device: torch.device) -> Parts:
    rows = parts * row_heads
    return Parts(
        torch.empty(rows, value, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
    )
