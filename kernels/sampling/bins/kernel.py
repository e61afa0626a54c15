"""Triton form of bins."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

_PER_UNIT = tl.constexpr(16.0)
_FAR = tl.constexpr(float(1 << 29))  # bins: differences of two fit int32
_NO_CUT = tl.constexpr(2**31 - 1)
_MARGIN = tl.constexpr(2.0**-5)  # of what top-p wants, on both sides
_PARTS = tl.constexpr(16)  # whose counts are added up at a time


class Cuts(NamedTuple):
    """What a row asks for: how many tokens (_NO_CUT: all), of what weight, each at least how probable as the first."""

    top_k: Any
    top_p: Any
    min_p: Any


class Range(NamedTuple):
    """Bins that are looked into, counted from the largest logit's down."""

    first: Any
    last: Any
    above: Any  # tokens in the bins before
    count: Any  # tokens in these bins; 0: there is no such range


@triton.jit
def is_cut(cuts):
    """By more than min-p, which weights alone tell."""
    return (cuts.top_k < _NO_CUT) | (cuts.top_p < 1)


@triton.jit
def per_unit(temperature):
    """Bins to 1 of the logits."""
    bits = tl.minimum(tl.maximum(temperature, 1.0), 1e30).to(tl.int32, bitcast=True)
    power = (((bits - 1) >> 23) + 1) << 23  # of two, at or above the temperature
    return _PER_UNIT / power.to(tl.float32, bitcast=True)


@triton.jit
def bin_of(x, density):
    """The larger, the larger x."""
    return tl.floor(tl.minimum(tl.maximum(x * density, -_FAR), _FAR)).to(tl.int32)


@triton.jit
def count_bins(x, valid, largest, density, counts, BINS: tl.constexpr):
    """counts [BINS] int16 of a part, from its largest logit's bin down."""
    bins = tl.minimum(bin_of(largest, density) - bin_of(x, density), BINS - 1)
    found = tl.histogram(bins, BINS, mask=valid)
    tl.store(counts + tl.arange(0, BINS), found.to(tl.int16))


@triton.jit
def _moved(counts, maxima, top, first, parts, density, BINS: tl.constexpr):
    """[parts, bins]: counts of some parts in the row's bins. Without what lies below."""
    part = first + tl.arange(0, _PARTS)
    valid = part < parts
    shift = top - bin_of(tl.load(maxima + part, mask=valid, other=0.0), density)
    bins = tl.arange(0, BINS)[None, :] - shift[:, None]
    mask = valid[:, None] & (bins >= 0) & (bins < BINS - 1) & (tl.arange(0, BINS) < BINS - 1)[None, :]
    return tl.load(counts + part[:, None] * BINS + bins, mask=mask, other=0).to(tl.int32)


@triton.jit
def _mean_of(bins, density, top, LOST: tl.constexpr):
    """The mean of a bin's logits. LOST: bits of float32's mantissa that the model's numbers do not have. Where those
    are further apart than bins, they lie at the lower end of theirs."""
    low = (top - bins).to(tl.float32) / density
    power = (low.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    spacing = power * (2.0 ** (LOST - 23))
    return low + tl.maximum(1.0 / density - spacing, 0.0) * 0.5


@triton.jit
def _at(values, bins, bin):
    return tl.sum(tl.where(bins == bin, values, 0))


@triton.jit
def find_range(counts, maxima, parts, largest, scale, density, cuts, BINS: tl.constexpr, MOST: tl.constexpr,
               LOST: tl.constexpr):  # fmt: skip
    """The Range of a row, of MOST tokens or fewer. counts [parts, BINS], maxima [parts]."""
    bins = tl.arange(0, BINS)
    top = bin_of(largest, density)
    found = tl.zeros((BINS,), tl.int32)
    for first in range(0, parts, _PARTS):
        found += tl.sum(_moved(counts, maxima, top, first, parts, density, BINS), 0)
    upto = tl.cumsum(found, 0)
    before = upto - found
    # where top-k cuts, exactly
    first = tl.sum((upto < cuts.top_k).to(tl.int32))
    middle = first
    last = first
    if cuts.top_p < 1:
        # where top-p cuts what top-k leaves, about
        mean = _mean_of(bins, density, top, LOST) - largest
        most_likely = tl.exp2(tl.minimum(mean + 1.0 / density, 0.0) * scale)
        weight = tl.where(most_likely >= cuts.min_p, tl.exp2(tl.minimum(mean, 0.0) * scale), 0.0)
        kept = tl.minimum(found, tl.maximum(cuts.top_k - before, 0))
        weights = tl.cumsum(kept.to(tl.float32) * weight, 0)
        total = tl.max(weights)
        target = cuts.top_p * total
        first = tl.sum((weights < target * (1.0 - _MARGIN)).to(tl.int32))
        middle = tl.sum((weights < target).to(tl.int32))
        if cuts.top_k == _NO_CUT:
            own = _at(found, bins, middle)
            most = _at(before, bins, middle) + own + (MOST - own) // 2
            last = tl.sum((weights < tl.minimum(target * (1.0 + _MARGIN), total)).to(tl.int32))
            last = tl.maximum(tl.minimum(last, tl.sum((upto <= most).to(tl.int32)) - 1), middle)
    end = _at(upto, bins, last)
    first = tl.minimum(tl.maximum(first, tl.sum((end - before > MOST).to(tl.int32))), last)
    above = _at(before, bins, first)
    is_there = (first <= middle) & (last < BINS - 1) & (end - above <= MOST)
    return Range(first, last, above, tl.where(is_there, end - above, 0))


@triton.jit
def count_before(counts, maxima, part, largest, density, range, BINS: tl.constexpr):
    """Tokens in the range that parts before this one have."""
    bins = tl.arange(0, BINS)
    is_in = (bins >= range.first) & (bins <= range.last)
    top = bin_of(largest, density)
    count = 0
    for first in tl.range(0, part, _PARTS):
        moved = _moved(counts, maxima, top, first, part, density, BINS)
        count += tl.sum(tl.where(is_in[None, :], moved, 0))
    return count
