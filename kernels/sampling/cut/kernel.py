"""Triton form of the cut of one row. What is searched is read BLOCK tokens at a time.

Sums are kept a lane apiece and reduced once a pass, which is more exact and cheaper than a reduction a block.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.sampling.edits.kernel import read

NO_KEY = tl.constexpr(-(2**31))  # below the key of every float
LOWEST_KEY = tl.constexpr(-2139095041)  # of -inf
ALL = tl.constexpr(2**31 - 1)


class Scale(NamedTuple):
    """A token weighs 2^((logit - largest) * scale), or 0 where that is below min_p."""

    largest: Any
    scale: Any  # log2(e) / temperature
    min_p: Any


class Searched(NamedTuple):
    """Tokens among which the cut lies, by id: those of the range that the second pass collected, or the whole row."""

    view: Any  # View, of the row
    some: Any  # [size] float32: the range's
    is_some: Any
    size: Any
    count: Any  # tokens above all of them, and what those weigh
    weight: Any


class Cut(NamedTuple):
    """What is kept: above this key everything that min_p leaves, and at it so many of the first."""

    key: Any
    kept: Any
    is_within: Any  # whether it lies among the tokens that were searched


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
def weight_of(x, scale):
    """Relative to the most likely token, 0 where min_p cuts."""
    weight = tl.exp2((x - scale.largest) * scale.scale)
    return tl.where(weight >= scale.min_p, weight, 0.0)


@triton.jit
def _read(searched, at, EDITED: tl.constexpr):
    valid = at < searched.size
    if searched.is_some:
        x = tl.load(searched.some + at, mask=valid, other=float("-inf"))
    else:
        x = read(searched.view, at, valid, EDITED)
    return x, valid


@triton.jit
def _above(searched, scale, key, EDITED: tl.constexpr, BLOCK: tl.constexpr):
    """Of the tokens at or above a key: (count, weight, lowest key); and the highest key below it."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    weight = tl.zeros((BLOCK,), tl.float32)
    lowest = tl.full((BLOCK,), ALL, tl.int32)
    highest = tl.full((BLOCK,), NO_KEY, tl.int32)
    for start in range(0, searched.size, BLOCK):
        x, valid = _read(searched, start + lane, EDITED)
        keys = tl.where(valid, keys_of(x), NO_KEY)
        high = keys >= key
        count += high.to(tl.int32)
        weight += tl.where(high, weight_of(x, scale), 0.0)
        lowest = tl.minimum(lowest, tl.where(high, keys, ALL))
        highest = tl.maximum(highest, tl.where(high, NO_KEY, keys))
    return tl.sum(count) + searched.count, tl.sum(weight) + searched.weight, tl.min(lowest), tl.max(highest)


@triton.jit
def _search(searched, scale, low, low_count, low_weight, wanted, target, EDITED: tl.constexpr, BLOCK: tl.constexpr):
    """The highest key at or above which there are `wanted` tokens that weigh `target`; `low` is known to be one.

    Returns (key, count and weight at or above it, count and weight above it). Where the count at it is just what is
    wanted the search ends, and what lies above is not known.
    """
    high = keys_of(scale.largest) + 1
    high_count = searched.count
    high_weight = searched.weight
    while low + 1 < high:
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, which cannot overflow
        count, weight, lowest, highest = _above(searched, scale, middle, EDITED, BLOCK)
        if (count >= wanted) & (weight >= target):
            low, low_count, low_weight = lowest, count, weight
            high = tl.where(count == wanted, low + 1, high)
        else:
            high, high_count, high_weight = highest + 1, count, weight
    return low, low_count, low_weight, high_count, high_weight


@triton.jit
def find_cut(searched, scale, weight, everything, top_k, top_p, EDITED: tl.constexpr, BLOCK: tl.constexpr):
    """The Cut. weight: of all that is searched and what lies above; everything: of the row. top_k: ALL is no cut, and
    otherwise its last token is among the searched.

    Two searches in one code: top-k by count, and on what that left, top-p by weight.
    """
    key = tl.full((), LOWEST_KEY, tl.int32)
    kept = tl.full((), ALL, tl.int32)
    is_within = tl.full((), True, tl.int1)
    count = searched.count + searched.size
    total = everything
    for by_weight in range(2):
        wanted = tl.where(by_weight == 1, 0, top_k)
        target = tl.where(by_weight == 1, top_p * total, 0.0)
        is_cut = ((by_weight == 0) & (top_k < ALL)) | ((by_weight == 1) & (top_p < 1))
        # what lies above may weigh enough already
        is_within &= (not is_cut) | (by_weight == 0) | (searched.count == 0) | (searched.weight < target)
        if is_cut & is_within:
            lowest = key
            key, found, least, more, more_weight = _search(
                searched, scale, key, count, weight, wanted, target, EDITED, BLOCK
            )
            at = weight_of(logit_of(key), scale)
            ties = (found - more).to(tl.float32)
            # the tie that reaches the target is still in
            up_to_target = tl.maximum(tl.ceil((target - more_weight) / tl.where(at > 0, at, 1.0)), 1.0)
            need = tl.where(by_weight == 1, up_to_target, (wanted - more).to(tl.float32))
            some = (found != wanted) & (need < ties)
            kept = tl.where(some, need.to(tl.int32), tl.where(key == lowest, kept, ALL))
            is_within = key > LOWEST_KEY  # else all that was searched does not weigh enough
            weight = tl.where(found == wanted, least, more_weight + tl.minimum(need, ties) * at)
            count = tl.minimum(top_k, found)
            total = weight
    return Cut(key, kept, is_within)


@triton.jit
def nth_at(searched, key, n, EDITED: tl.constexpr, BLOCK: tl.constexpr):
    """The place of the n-th token (from 1) whose key this is."""
    lane = tl.arange(0, BLOCK)
    seen = 0
    start = 0
    found = searched.size
    while start < searched.size:
        x, valid = _read(searched, start + lane, EDITED)
        here = (valid & (keys_of(x) == key)).to(tl.int32)
        count = tl.sum(here)
        if seen + count >= n:
            found = tl.min(tl.where((here > 0) & (seen + tl.cumsum(here, 0) == n), start + lane, searched.size))
            start = searched.size
        else:
            seen += count
            start += BLOCK
    return found
