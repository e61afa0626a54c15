"""How tokens are drawn: parameters of all rows as arrays, and a uniform number for each."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from kernels.sampling import GREEDY_BELOW
from server.engine.request import Request

_MASK64 = (1 << 64) - 1
_LARGEST_DRAW = 1 - 2**-24  # below 1 in float32 too
_LARGEST_TOP_K = 2**31 - 1
_LARGEST_TEMPERATURE = 1e30  # finite in float32: a logit of -inf divided by infinity would not be a number
_STEP, _INDEX_STEP, _FIRST, _SECOND = (
    np.uint64(it) for it in (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
Numbers = np.ndarray[Any, Any]


def uniform(seeds: Numbers, indices: Numbers) -> Numbers:
    """A number in [0, 1) for the indices-th token of requests with these seeds (uint64): SplitMix64 of both.

    A counter-based generator has no state, so a token does not depend on the batch it was computed in, nor on whether
    its request was preempted meanwhile.
    """
    z = seeds * _STEP + (indices.astype(np.uint64) + np.uint64(1)) * _INDEX_STEP
    for _ in range(2):
        z = z + _STEP
        z = (z ^ (z >> np.uint64(30))) * _FIRST
        z = (z ^ (z >> np.uint64(27))) * _SECOND
        z ^= z >> np.uint64(31)
    drawn: Numbers = (z >> np.uint64(11)) / float(1 << 53)
    return drawn


class Draws(NamedTuple):
    """Of each row, float32 but for top_k (int32): as kernels.sampling.sample takes them, on the host or the device."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    draws: Any

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return cls._fields

    @classmethod
    def types(cls) -> Mapping[str, torch.dtype]:
        return {name: torch.int32 if name == "top_k" else torch.float32 for name in cls._fields}


class Drawn:
    """What is the same in every step of the same requests is made once for them."""

    def __init__(self, requests: Sequence[Request]) -> None:
        samplings = [it.sampling for it in requests]
        self._greedy = Draws(
            np.array([min(it.temperature, _LARGEST_TEMPERATURE) for it in samplings], np.float32),
            np.array([min(max(it.top_k, 0), _LARGEST_TOP_K) for it in samplings], np.int32),
            np.array([it.top_p for it in samplings], np.float32),
            np.array([it.min_p for it in samplings], np.float32),
            np.zeros(len(samplings), np.float32),
        )
        self._seeds = np.array([it.seed & _MASK64 for it in samplings], np.uint64)
        self._prompt_lens = np.array([it.first.prompt_len for it in requests])
        self.is_drawn = np.array([it.temperature >= GREEDY_BELOW for it in samplings], bool)
        self.is_greedy = not self.is_drawn.any()

    def draws(self, lengths: Numbers) -> Draws:
        """lengths: tokens of each request's first lane, before the one that is drawn."""
        if self.is_greedy:
            return self._greedy
        numbers = np.minimum(uniform(self._seeds, lengths - self._prompt_lens), _LARGEST_DRAW)
        drawn = np.where(self.is_drawn, numbers, 0.0).astype(np.float32)
        return self._greedy._replace(draws=drawn)
