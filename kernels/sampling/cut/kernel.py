"""Triton form of the cut of one row. Every pass over the vocabulary takes BLOCK tokens at a time.

Sums are kept a lane apiece and reduced once a pass, which is more exact and cheaper than a reduction a block.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-(2**31))  # below the key of every float
LOWEST_KEY = tl.constexpr(-2139095041)  # of -inf
ALL = tl.constexpr(2**31 - 1)


class Row(NamedTuple):
    """A row of logits in a kernel. A token weighs 2^((logit - largest) * scale), or 0 where that is below min_p."""

    logits: Any  # pointer, [V]
    V: Any
    largest: Any
    scale: Any  # log2(e) / temperature
    min_p: Any


@triton.jit
def keys_of(x):
    """int32 in the order of float32 x, with -0.0 equal to 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def logit_of(key):
    """The inverse of keys_of."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(x, row):
    """Relative to the most likely token, 0 where min_p cuts."""
    weight = tl.exp2((x - row.largest) * row.scale)
    return tl.where(weight >= row.min_p, weight, 0.0)


@triton.jit
def _above(row, key, BLOCK: tl.constexpr):
    """Of the row's tokens at or above a key: (count, weight, lowest key); and the highest key below it."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    weight = tl.zeros((BLOCK,), tl.float32)
    lowest = tl.full((BLOCK,), ALL, tl.int32)
    highest = tl.full((BLOCK,), NO_KEY, tl.int32)
    for start in range(0, row.V, BLOCK):
        valid = start + lane < row.V
        x = tl.load(row.logits + start + lane, mask=valid, other=float("-inf")).to(tl.float32)
        keys = tl.where(valid, keys_of(x), NO_KEY)
        high = keys >= key
        count += high.to(tl.int32)
        weight += tl.where(high, weight_of(x, row), 0.0)
        lowest = tl.minimum(lowest, tl.where(high, keys, ALL))
        highest = tl.maximum(highest, tl.where(high, NO_KEY, keys))
    return tl.sum(count), tl.sum(weight), tl.min(lowest), tl.max(highest)


@triton.jit
def _search(row, low, low_count, low_weight, wanted, target, BLOCK: tl.constexpr):
    """The highest key at or above which there are `wanted` tokens that weigh `target`; `low` is known to be one.

    Returns (key, count and weight at or above it, count and weight above it). Where the count at it is just what is
    wanted the search ends, and what lies above is not known.
    """
    high = keys_of(row.largest) + 1
    high_count = 0
    high_weight = 0.0
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, which cannot overflow
        middle = tl.where(wanted == row.V, low, middle)  # everything is wanted: weigh it
        count, weight, lowest, highest = _above(row, middle, BLOCK)
        if (count >= wanted) & (weight >= target):
            low, low_count, low_weight = lowest, count, weight
            high = tl.where(count == wanted, low + 1, high)
        else:
            high, high_count, high_weight = highest + 1, count, weight
    return low, low_count, low_weight, high_count, high_weight


@triton.jit
def nth_at(row, key, n, BLOCK: tl.constexpr):
    """The id of the n-th token (from 1) whose key this is."""
    lane = tl.arange(0, BLOCK)
    seen = 0
    start = 0
    found = row.V
    while start < row.V:
        valid = start + lane < row.V
        x = tl.load(row.logits + start + lane, mask=valid, other=float("-inf")).to(tl.float32)
        here = (valid & (keys_of(x) == key)).to(tl.int32)
        count = tl.sum(here)
        if seen + count >= n:
            found = tl.min(tl.where((here > 0) & (seen + tl.cumsum(here, 0) == n), start + lane, row.V))
            start = row.V
        else:
            seen += count
            start += BLOCK
    return found


@triton.jit
def find_cut(row, top_k, top_p, BLOCK: tl.constexpr):
    """What is kept: (key, how many of the tokens at it, weight kept); and all above it, unless min_p cuts it.

    Two searches in one code: top-k by count (without it, one pass that weighs everything), and on what that left, top-p
    by weight.
    """
    key = tl.full((), LOWEST_KEY, tl.int32)
    kept = tl.full((), ALL, tl.int32)
    count = tl.where((top_k > 0) & (top_k < row.V), top_k, row.V)
    total = 0.0
    for by_weight in range(2):
        if (by_weight == 0) | (top_p < 1):
            wanted = tl.where(by_weight == 1, 0, count)
            target = tl.where(by_weight == 1, top_p * total, 0.0)
            before = tl.where(by_weight == 1, count, row.V)
            lowest = key
            key, found, weight, more, more_weight = _search(row, lowest, before, total, wanted, target, BLOCK)
            at = weight_of(logit_of(key), row)
            ties = (found - more).to(tl.float32)
            # the tie that reaches the target is still in
            up_to_target = tl.maximum(tl.ceil((target - more_weight) / tl.where(at > 0, at, 1.0)), 1.0)
            need = tl.where(by_weight == 1, up_to_target, (wanted - more).to(tl.float32))
            some = (found != wanted) & (need < ties)
            kept = tl.where(some, need.to(tl.int32), tl.where(key == lowest, kept, ALL))
            total = tl.where(found == wanted, weight, more_weight + tl.minimum(need, ties) * at)
    return key, kept, total
