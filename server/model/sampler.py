"""From logits to tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

import kernels.sampling
from kernels.sampling import GREEDY_BELOW, Sampled
from server.engine.request import Sampling

__all__ = ["GREEDY_BELOW", "SampledRows", "sample", "uniform"]

_MASK64 = (1 << 64) - 1
_LARGEST_DRAW = 1 - 2**-24  # below 1 in float32 too
_LARGEST_TOP_K = 2**31 - 1


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
    """Tokens of the rows of a step, on their way from the device.

    They are copied when the step is launched, and only that copy is waited for: not what was launched behind it.
    """

    def __init__(self, sampled: Sampled) -> None:
        tokens = torch.where(sampled.finite, sampled.tokens, -1)
        self._copied: torch.cuda.Event | None = None
        if tokens.is_cuda:
            on_host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            tokens = on_host.copy_(tokens, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._tokens = tokens

    def read(self) -> list[int | None]:
        """By row; None where its logits are not finite."""
        if self._copied is not None:
            self._copied.synchronize()
        tokens: list[int] = self._tokens.tolist()
        return [token if token >= 0 else None for token in tokens]


def sample(logits: Tensor, samplings: Sequence[Sampling], indices: Sequence[int]) -> SampledRows:
    """One token a row. logits [R, V]; indices: how many tokens each request has generated before."""
    if all(it.temperature < GREEDY_BELOW for it in samplings):
        return SampledRows(kernels.sampling.greedy(logits))
    draws = [
        min(uniform(it.seed, index), _LARGEST_DRAW) if it.temperature >= GREEDY_BELOW else 0.0
        for it, index in zip(samplings, indices, strict=True)
    ]
    parameters = torch.tensor(
        [[it.temperature for it in samplings], [it.top_p for it in samplings], [0.0] * len(draws), draws],
        dtype=torch.float32,
        pin_memory=logits.is_cuda,
    ).to(logits.device, non_blocking=True)
    limits = [min(it.top_k, _LARGEST_TOP_K) for it in samplings]
    top_k = torch.tensor(limits, dtype=torch.int32, pin_memory=logits.is_cuda)
    temperature, top_p, min_p, uniforms = parameters
    return SampledRows(
        kernels.sampling.sample(logits, temperature, top_k.to(logits.device, non_blocking=True), top_p, min_p, uniforms)
    )
