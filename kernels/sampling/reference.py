"""Reference and CPU path of sampling: what a token is, given logits, parameters and one uniform number a row.

The steps, in order, for each row:

1. Edits (edits/), where it has any.
2. A temperature below GREEDY_BELOW takes the largest logit, the lowest id among equals.
3. Otherwise probabilities are softmax(logits / temperature) and the tokens kept are, in the order of (logit descending,
   id ascending): the first `top_k`; of those the ones at least `min_p` times as probable as the first; of those, with
   their probabilities summing to 1, the first ones up to and including the one that reaches `top_p`. Each cut keeps a
   prefix of that order, and never less than its first token.
4. The uniform number inverts the cumulative distribution of the kept tokens in the order of their *ids*, which needs no
   sort once the cut is known.

A row with NaN or +inf (or nothing above -inf) is not finite: token 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.sampling.edits.reference import Edits, edited

_FEW = 1024  # tokens among which a cut is looked for first; a sort of the whole vocabulary is many times as slow
GREEDY_BELOW = 1e-5  # a temperature below this is greedy: logits apart by 1e-3 differ by a factor of e^100


class Parameters(NamedTuple):
    """temperature, top_p (1 is off), min_p (0 is off), draws (uniform in [0, 1]): [R] float32. top_k [R] int32 (0 is
    off). Of a row whose token nobody reads they may be anything."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    draws: Tensor


class Sampled(NamedTuple):
    """A token for each row, and whether the row's logits were finite."""

    tokens: Tensor  # [R] int64
    finite: Tensor  # [R] bool


def sample(logits: Tensor, parameters: Parameters, edits: Edits | None = None, out: Sampled | None = None) -> Sampled:
    """One token a row, by the steps above. logits [R, V], float32, bfloat16 or float16, rows contiguous: they stay as
    they are. out: written, and returned."""
    chosen = _choose(logits, parameters) if edits is None else _choose_edited(logits, parameters, edits)
    return chosen if out is None else _written(chosen, out)


def greedy(logits: Tensor, out: Sampled | None = None) -> Sampled:
    """logits [R, V], as of `sample`, with every temperature 0 and no edits."""
    largest, tokens = logits.max(-1)  # NaN is larger than anything here, and the first of equals counts
    finite = largest.isfinite()
    chosen = Sampled(torch.where(finite, tokens, 0), finite)
    return chosen if out is None else _written(chosen, out)


def _written(chosen: Sampled, out: Sampled) -> Sampled:
    return Sampled(*(to.copy_(it) for to, it in zip(out, chosen, strict=True)))


def _choose_edited(logits: Tensor, parameters: Parameters, edits: Edits) -> Sampled:
    """What some do with their logits costs the others nothing: of the rows that are edited a copy is."""
    rows = ((edits.mask_rows >= 0) | (edits.places >= 0)).nonzero()[:, 0]
    copy = edited(logits.index_select(0, rows).float(), edits, rows)
    chosen = _choose(copy, Parameters(*(it[rows] for it in parameters)))
    if len(rows) == len(logits):
        return chosen
    # in the others' place the edited rows are chosen from as is the cheapest
    others = _choose(logits, parameters._replace(temperature=parameters.temperature.index_fill(0, rows, 0.0)))
    return Sampled(*(theirs.index_copy_(0, rows, its) for theirs, its in zip(others, chosen, strict=True)))


def _choose(logits: Tensor, parameters: Parameters) -> Sampled:
    tokens, finite = greedy(logits)
    temperature, top_k, top_p, min_p, _ = parameters
    sampled = finite & (temperature >= GREEDY_BELOW)
    if sampled.any():  # else it was one pass over the logits
        cut = ((top_k > 0) & (top_k < logits.shape[-1])) | (top_p < 1) | (min_p > 0)
        for rows, keep in ((sampled & ~cut, False), (sampled & cut, True)):
            chosen = rows.nonzero()[:, 0]
            if len(chosen):
                tokens[chosen] = _draw(logits[chosen].float(), Parameters(*(it[chosen] for it in parameters)), keep)
    return Sampled(tokens, finite)


def _draw(logits: Tensor, parameters: Parameters, cut: bool) -> Tensor:
    """Token ids [R]. logits [R, V] float32, finite or -inf. Without `cut` all tokens are kept."""
    temperature, top_k, top_p, min_p, draws = parameters
    # relative to the largest, so that a small temperature underflows to 0 instead of overflowing to infinity
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature[:, None]).exp_()
    if cut:
        few = min(_FEW, logits.shape[-1])
        kept = _kept(logits, weights, temperature, top_k, top_p, min_p, few)
        if kept is None:
            kept = _kept(logits, weights, temperature, top_k, top_p, min_p, logits.shape[-1])
            assert kept is not None
        weights.masked_fill_(~kept, 0.0)
    cumulative = weights.cumsum(-1)
    at = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    # a draw of 1, or rounding, may land behind the last token kept: the first place that has the whole sum is that one
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(at, last)[:, 0]


def _kept(
    logits: Tensor, weights: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, few: int
) -> Tensor | None:
    """Which tokens [R, V] are kept, from the `few` largest logits alone; None if those may not be all that are."""
    top_k = torch.where(top_k > 0, top_k, logits.shape[-1])[:, None]
    min_p, top_p = min_p[:, None].clamp(max=1.0), top_p[:, None]
    ordered = (logits.sort(-1, descending=True) if few == logits.shape[-1] else logits.topk(few)).values
    best = ((ordered - ordered[:, :1]) / temperature[:, None]).exp_()
    kept = (torch.arange(few, device=logits.device) < top_k) & (best >= min_p)
    cumulative = best.masked_fill(~kept, 0.0).cumsum(-1)
    everything = weights.masked_fill(weights < min_p, 0.0).sum(-1, keepdim=True)
    total = torch.where(top_k < logits.shape[-1], cumulative[:, -1:], everything)
    kept &= (cumulative - best < top_p * total) | (top_p >= 1)
    count = kept.sum(-1, keepdim=True).clamp(min=1)
    if few < logits.shape[-1] and ((count == few) & (top_k != few)).any():
        return None
    # the cut as a logit and how many of the tokens that have it, which needs no order among equals
    least = ordered.gather(-1, count - 1)
    kept = logits >= least
    if (kept.sum(-1, keepdim=True) > count).any():
        equal = logits == least
        ties = count - (ordered > least).sum(-1, keepdim=True)
        kept &= ~equal | (equal.cumsum(-1) <= ties)
    return kept
