"""From logits to tokens."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import kernels.sampling
from kernels.sampling import GREEDY_BELOW, Penalties, Sampled
from server.engine.masks import Mask
from server.engine.request import Request, Sampling, Token
from server.model.copies import ToHost, to_device
from server.model.edits import edited, is_edited, penalties
from server.model.logprobs import LogprobRows, is_finite

__all__ = ["GREEDY_BELOW", "SampledRows", "sample", "uniform"]

_MASK64 = (1 << 64) - 1
_LARGEST_DRAW = 1 - 2**-24  # below 1 in float32 too
_LARGEST_TOP_K = 2**31 - 1
_LARGEST_TEMPERATURE = 1e30  # finite in float32: a logit of -inf divided by infinity would not be a number
_GREEDY = Sampling(temperature=0.0)
_NO_MASKS: Mapping[int, Mask] = {}


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


class SampledRows:
    """Tokens of the rows of a step, on their way from the device, and what is said of them where it was asked for."""

    def __init__(self, logits: Tensor, sampled: Sampled, requests: Sequence[Request]) -> None:
        """logits [R, V]: as the model has them."""
        self._on_host = ToHost(torch.where(sampled.finite, sampled.tokens, -1))
        told = {row: num for row, it in enumerate(requests) if (num := it.sampling.num_logprobs) is not None}
        self._told = tuple(told)
        self._logprobs: LogprobRows | None = None
        if told:
            tokens = sampled.tokens
            if len(told) < len(requests):
                rows = to_device(self._told, torch.int64, logits.device)
                logits, tokens = logits.index_select(0, rows), tokens.index_select(0, rows)
            self._logprobs = LogprobRows(logits, tokens, list(told.values()))

    def read(self) -> list[Token | None]:
        """By row; None where its logits are not finite."""
        (ids,) = self._on_host.read()
        tokens = [Token(token) if token >= 0 else None for token in ids.tolist()]
        if self._logprobs is not None:
            for row, logprobs in zip(self._told, self._logprobs.read(), strict=True):
                token = tokens[row]
                tokens[row] = Token(token.id, logprobs) if token is not None and is_finite(logprobs) else None
        return tokens


def sample(logits: Tensor, requests: Sequence[Request], masks: Mapping[int, Mask] = _NO_MASKS) -> SampledRows:
    """The next token of each request. logits [R, V]: a row for each, as the model has them. masks: by request, of those
    that have one.

    What some do with their logits costs the others nothing: they are chosen from as if nobody did, and of those rows
    that are edited a copy is.
    """
    rows = [row for row, request in enumerate(requests) if is_edited(request) or request.id in masks]
    if not rows:
        return SampledRows(logits, _choose(logits, requests), requests)
    these, where = [requests[row] for row in rows], to_device(rows, torch.int64, logits.device)
    copy = edited(logits.index_select(0, where).float(), these, [masks.get(it.id) for it in these])
    chosen = _choose(copy, these, penalties=penalties(these, logits.device))
    if len(rows) < len(requests):
        others = _choose(logits, requests, greedily=rows)
        chosen = Sampled(*(theirs.index_copy(0, where, its) for theirs, its in zip(others, chosen, strict=True)))
    return SampledRows(logits, chosen, requests)


def _choose(
    logits: Tensor, requests: Sequence[Request], greedily: Sequence[int] = (), penalties: Penalties | None = None
) -> Sampled:
    """greedily: rows that others decide, for which the cheapest will do."""
    samplings = [it.sampling for it in requests]
    for row in greedily:
        samplings[row] = _GREEDY
    if penalties is None and all(it.temperature < GREEDY_BELOW for it in samplings):
        return kernels.sampling.greedy(logits)
    draws = [
        min(uniform(it.seed, request.num_generated), _LARGEST_DRAW) if it.temperature >= GREEDY_BELOW else 0.0
        for it, request in zip(samplings, requests, strict=True)
    ]
    temperature, top_p, min_p, uniforms = to_device(
        [
            [min(it.temperature, _LARGEST_TEMPERATURE) for it in samplings],
            [it.top_p for it in samplings],
            [it.min_p for it in samplings],
            draws,
        ],
        torch.float32,
        logits.device,
    )
    top_k = to_device([min(max(it.top_k, 0), _LARGEST_TOP_K) for it in samplings], torch.int32, logits.device)
    return kernels.sampling.sample(logits, temperature, top_k, top_p, min_p, uniforms, penalties)
