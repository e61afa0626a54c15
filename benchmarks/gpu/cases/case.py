"""What every case has, and what their inputs are drawn from."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.gpu.measure import Scale

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """`timed` are calls that do the same on different memory, so many that they outgrow the caches: of weights and KV
    caches, which a step reads once. Activations stay where they are, since a step finds them in the cache too.

    num_bytes and num_ops: what any implementation has to read and write, and to multiply and add.
    counters: what must be zero before and after.
    """

    op: str
    name: str
    dtype: torch.dtype
    kernel: Callable[[], Outputs]
    reference: Callable[[], Outputs]
    timed: Sequence[Callable[[], object]]
    num_bytes: int = 0
    num_ops: int = 0
    exact: bool = False
    counters: Sequence[Tensor] = field(default=())

    @property
    def tolerance(self) -> float:
        """Of the largest element of the reference's."""
        if self.exact:
            return 0.0
        return 2e-2 if self.dtype == torch.bfloat16 else 2e-4


def errors_of(case: Case) -> float:
    """Of the kernel, relative to the largest element of the reference. Infinite where it is not finite."""
    pairs = zip(as_tuple(case.kernel()), as_tuple(case.reference()), strict=True)
    return max(_error(got.double(), want.double()) for got, want in pairs)


def as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return float("inf")
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30)) if got.numel() else 0.0


class Draw:
    """Inputs of a dtype, at random from `seed`."""

    def __init__(self, scale: Scale, dtype: torch.dtype, seed: int) -> None:
        self.scale, self.dtype, self.device = scale, dtype, scale.device
        self.rng = random.Random(seed)
        torch.manual_seed(seed)

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype) * scale

    def ints(self, values: Sequence[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def zeros(self, count: int) -> Tensor:
        """Counters."""
        return torch.zeros(count, dtype=torch.int32, device=self.device)

    @property
    def token_counts(self) -> tuple[int, ...]:
        return (3,) if self.scale.is_toy else (1, 8, 32, 128, 256, 2048)
