"""Triton form of the draw, by one program a row."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.sampling.cut.kernel import ALL, LOWEST_KEY, Searched, find_cut, keys_of, nth_at, weight_of
from kernels.sampling.edits.kernel import read

NUM_SUMS = tl.constexpr(3)


class Scratch(NamedTuple):
    """What one launch leaves for the next. In a kernel, pointers."""

    maxima: Any  # [R, parts] float32: +inf where anything is NaN
    best: Any  # [R, parts] int32: the lowest id of the largest
    counts: Any  # [R, parts, bins] int16
    sums: Any  # [R, 3, parts] float32: weights above the range, within it and below
    found: Any  # [R, 2] int32: tokens in the range, and above it
    some: Any  # [R, PART] float32: the range's logits, by id
    ids: Any  # [R, PART] int32: theirs


@triton.jit
def _is_kept(keys, at, key, last_tie):
    return (keys > key) | ((keys == key) & (at <= last_tie))


@triton.jit
def _weights_of_some(weights, some, ids, count, scale, key, last_tie, PARTS: tl.constexpr, PART: tl.constexpr):
    """[PARTS]: with the range's tokens that are kept."""
    SOME: tl.constexpr = 4096 // PARTS
    part = tl.arange(0, PARTS)
    for start in range(0, count, SOME):
        at = start + tl.arange(0, SOME)
        x = tl.load(some + at, mask=at < count, other=float("-inf"))
        weight = tl.where(_is_kept(keys_of(x), at, key, last_tie), weight_of(x, scale), 0.0)
        own = tl.load(ids + at, mask=at < count, other=0) // PART
        weights += tl.sum(tl.where(own[:, None] == part[None, :], weight[:, None], 0.0), 0)
    return weights


@triton.jit
def _kept_weights(view, V, scale, key, last_tie, EDITED: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """[PARTS]: of each part's tokens that are kept, by a pass over the row."""
    part = tl.arange(0, PARTS)
    weights = tl.zeros((PARTS,), tl.float32)
    for start in range(0, V, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = read(view, ids, ids < V, EDITED)
        weight = tl.where(_is_kept(keys_of(x), ids, key, last_tie), weight_of(x, scale), 0.0)
        weights += tl.where(part == start // PART, tl.sum(weight), 0.0)
    return weights


@triton.jit
def cut_row(r, view, V, parts, scale, cuts, scratch, EDITED: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """(key, the last id that is kept at it, and [PARTS] what is kept of each part weighs)."""
    part = tl.arange(0, PARTS)
    sums = scratch.sums + r * NUM_SUMS * parts + part
    above = tl.load(sums, mask=part < parts, other=0.0)
    within = tl.sum(tl.load(sums + parts, mask=part < parts, other=0.0))
    below = tl.sum(tl.load(sums + 2 * parts, mask=part < parts, other=0.0))
    everything = tl.sum(above) + within + below
    count, more = tl.load(scratch.found + r * 2), tl.load(scratch.found + r * 2 + 1)
    some, ids = scratch.some + r.to(tl.int64) * PART, scratch.ids + r.to(tl.int64) * PART
    key = tl.full((), LOWEST_KEY, tl.int32)
    last_tie = V
    # among the range's tokens; if there is no range, or the cut is not in it, in the whole row
    is_some = count == 0
    is_found = False
    while not is_found:
        is_some = not is_some
        weight_above = tl.where(is_some, tl.sum(above), 0.0)
        size = tl.where(is_some, count, V)
        searched = Searched(view, some, is_some, size, tl.where(is_some, more, 0), weight_above)
        weight = tl.where(is_some, weight_above + within, everything)
        cut = find_cut(searched, scale, weight, everything, cuts.top_k, cuts.top_p, EDITED, BLOCK)
        is_found = cut.is_within | (not is_some)
        if is_found:
            key = cut.key
            last_tie = V
            if cut.kept < ALL:
                last_tie = nth_at(searched, key, cut.kept, EDITED, BLOCK)
    if is_some:
        weights = _weights_of_some(above, some, ids, count, scale, key, last_tie, PARTS, PART)
        if last_tie < count:
            last_tie = tl.load(ids + last_tie)
    else:
        weights = _kept_weights(view, V, scale, key, last_tie, EDITED, PARTS, PART, BLOCK)
    return key, last_tie, weights


@triton.jit
def draw_token(
    view,
    V,
    scale,
    key,
    last_tie,
    weights,
    draw,
    EDITED: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first token up to which the kept weights sum to more than the draw's share of all; weights: of parts."""
    part = tl.arange(0, PARTS)
    ends = tl.cumsum(weights, 0)
    target = draw * tl.max(ends)
    own = tl.min(tl.where((weights > 0) & (ends > target), part, PARTS))
    # rounding, or a draw of 1, placed the target at the end: the last one that counts, there and in the part
    own = tl.where(own < PARTS, own, tl.max(tl.where(weights > 0, part, 0)))
    target -= tl.sum(tl.where(part == own - 1, ends, 0.0))
    token = V
    likely = 0
    for start in range(own * PART, tl.minimum(own * PART + PART, V), BLOCK):
        ids = start + tl.arange(0, BLOCK)
        x = read(view, ids, ids < V, EDITED)
        weight = tl.where(_is_kept(keys_of(x), ids, key, last_tie), weight_of(x, scale), 0.0)
        token = tl.minimum(token, tl.min(tl.where((weight > 0) & (tl.cumsum(weight, 0) > target), ids, V)))
        likely = tl.maximum(likely, tl.max(tl.where(weight > 0, ids, 0)))
        target -= tl.sum(weight)
    return tl.where(token < V, token, likely)
