"""Roughly where a row is cut: counts of its logits by bin, made in the first pass, so that the second one can collect
the few logits among which the cut lies.

Widths of bins are powers of two, 1/16 for temperatures up to 1 and more above. So every part of the vocabulary counts
on its own, in bins from that of its own largest logit down; moved by how far the largest ones are apart, counts of all
parts are of the same bins. The last bin is whatever lies further down: 32 for temperatures up to 1.

Counts say exactly in which bin the k-th token is. Where top-p cuts is estimated, as if all logits of a bin were its
mean, and a margin is taken on both sides. The second pass weighs what lies above the range that is taken, and within
it, so an estimate that was wrong is noticed, and the row is then searched as a whole.

Running example, one row of two parts, [3.0, 0.9] and [1.0, -0.1], temperature 1. In sixteenths the largest ones are 48
and 16, so the second part's counts move by 32 bins.

    part 0    bin 0: 1, bin 34: 1      0.9 is 14.4 sixteenths
    part 1    bin 0: 1, bin 18: 1      in the row's bins 32 and 50
    together  bin 0: 1, bin 32: 1, bin 34: 1, bin 50: 1
    top-k 2   the range is bin 32, one token; one lies above
"""
