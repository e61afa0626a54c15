"""From logits to tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from server.model.inputs import SamplingLike

_MASK64 = (1 << 64) - 1
GREEDY_BELOW = 1e-5  # a temperature below this is greedy: logits apart by 1e-3 differ by a factor of e^100


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for the index-th token of a request: SplitMix64 of both.

    A counter-based generator has no state, so a token does not depend on the batch it was computed in, nor on whether
    its request was preempted meanwhile.
    """
    z = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) & _MASK64
    for _ in range(2):
        z = (z + 0x9E3779B97F4A7C15) & _MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
        z ^= z >> 31
    return (z >> 11) / (1 << 53)


def sample(logits: Tensor, samplings: Sequence[SamplingLike], indices: Sequence[int]) -> list[int]:
    """One token a row. logits [R, V], finite; indices: how many tokens each request has generated before."""
    tokens: list[int] = logits.argmax(-1).tolist()
    rows = [row for row, sampling in enumerate(samplings) if sampling.temperature >= GREEDY_BELOW]
    if rows:
        chosen = [samplings[row] for row in rows]
        draws = torch.tensor([uniform(samplings[row].seed, indices[row]) for row in rows])
        for row, token in zip(rows, _draw(logits[rows].float(), chosen, draws), strict=True):
            tokens[row] = token
    return tokens


def _draw(logits: Tensor, samplings: Sequence[SamplingLike], draws: Tensor) -> list[int]:
    """Invert the cumulative distribution of the tokens that top-k and top-p leave, most likely first.

    The most likely token is always left, whatever rounding does to tiny parameters.
    """
    temperature = torch.tensor([sampling.temperature for sampling in samplings])[:, None]
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    # relative to the largest, so that a small temperature underflows to 0 instead of overflowing to infinity
    probabilities = ((ordered - ordered[:, :1]) / temperature).softmax(-1)
    vocab = logits.shape[-1]
    rank = torch.arange(vocab)
    top_k = torch.tensor([sampling.top_k or vocab for sampling in samplings])[:, None]
    top_p = torch.tensor([sampling.top_p for sampling in samplings])[:, None]
    probabilities = probabilities.masked_fill(rank >= top_k, 0.0)
    # top-p on what top-k left; the token that crosses p is still in
    probabilities /= probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill((before >= top_p) & (top_p < 1) & (rank > 0), 0.0)
    cumulative = probabilities.cumsum(-1)
    at = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(-1)
    # rounding may place the draw behind the last token left; take that one
    last = (probabilities > 0).sum(-1) - 1
    return ids.gather(-1, torch.minimum(at, last)[:, None])[:, 0].tolist()
