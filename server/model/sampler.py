"""From logits to tokens."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

import kernels.sampling
from kernels.sampling import GREEDY_BELOW, Edits, Parameters, Sampled
from server.engine.masks import Mask
from server.engine.request import Request, Token
from server.model.copies import ToHost, to_device
from server.model.draws import Drawn, Draws
from server.model.edits import FedBack, edits_of, may_have_place
from server.model.inputs import Integers
from server.model.logprobs import LogprobRows, is_finite

__all__ = ["GREEDY_BELOW", "SampledRows", "Sampler"]

_NO_MASKS: Mapping[int, Mask] = {}


class SampledRows:
    """Tokens of the rows of a step, on their way from the device, and what is said of them where it was asked for."""

    def __init__(self, logits: Tensor, sampled: Sampled, told: Mapping[int, int]) -> None:
        """logits [R, V]: as the model has them. told: by row, of how many of the most probable tokens is told."""
        self._on_host = ToHost(torch.where(sampled.finite, sampled.tokens, -1))
        self._told = tuple(told)
        self._logprobs: LogprobRows | None = None
        if told:
            tokens = sampled.tokens
            if len(told) < len(tokens):
                rows = to_device(self._told, torch.int64, logits.device)
                logits, tokens = logits.index_select(0, rows), tokens.index_select(0, rows)
            self._logprobs = LogprobRows(logits, tokens, list(told.values()))

    @property
    def is_told_of(self) -> bool:
        """Whether more is said of any than which token it is."""
        return self._logprobs is not None

    def read_ids(self) -> list[int]:
        """By row; -1 where its logits are not finite."""
        (ids,) = self._on_host.read()
        told: list[int] = ids.tolist()
        return told

    def read(self) -> list[Token | None]:
        """By row; None where its logits are not finite."""
        tokens = [Token(token) if token >= 0 else None for token in self.read_ids()]
        if self._logprobs is not None:
            for row, logprobs in zip(self._told, self._logprobs.read(), strict=True):
                token = tokens[row]
                tokens[row] = Token(token.id, logprobs) if token is not None and is_finite(logprobs) else None
        return tokens


class Sampler:
    """The next tokens of these requests, in this order, step after step. What is known of them for good is looked at
    once."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self._drawn = Drawn(requests)
        self._may_be_edited = any(map(may_have_place, requests))
        self._told = {row: num for row, it in enumerate(requests) if (num := it.sampling.num_logprobs) is not None}

    def draws(self, lengths: Integers) -> Draws:
        """Of their next tokens. lengths: of their first lanes, before those."""
        return self._drawn.draws(lengths)

    def sample(
        self,
        logits: Tensor,
        draws: Draws,
        masks: Mapping[int, Mask] = _NO_MASKS,
        sampled: Sampled | None = None,
        fed_back: FedBack | None = None,
        out: Sampled | None = None,
    ) -> tuple[Sampled, SampledRows]:
        """logits [R, V]: a row for each request, as the model has them. masks: by request, of those that have one.
        sampled: what was chosen along with the logits, as if nobody edited them. Returns what was chosen (in `out`, if
        it is given), there and on its way.

        What some do with their logits costs the others nothing (kernels/sampling/edits).
        """
        edits = None
        if masks or self._may_be_edited:
            edits = edits_of(self.requests, masks, logits.shape[1], logits.device, fed_back)
        if sampled is None or edits is not None:
            sampled = self._choose(logits, draws, edits, out)
        return sampled, SampledRows(logits, sampled, self._told)

    def _choose(self, logits: Tensor, draws: Draws, edits: Edits | None, out: Sampled | None) -> Sampled:
        if edits is None and self._drawn.is_greedy:
            return kernels.sampling.greedy(logits, out)
        floats = np.stack([draws.temperature, draws.top_p, draws.min_p, draws.draws])
        temperature, top_p, min_p, uniforms = to_device(floats, torch.float32, logits.device)
        top_k = to_device(draws.top_k, torch.int32, logits.device)
        return kernels.sampling.sample(logits, Parameters(temperature, top_k, top_p, min_p, uniforms), edits, out)
