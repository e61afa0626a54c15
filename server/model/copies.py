"""Small tensors between host and device. Nobody waits for a copy before its content is needed."""

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor


def to_device(values: Sequence[object] | numpy.ndarray[Any, Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers, or rows of numbers."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class Computing:
    """Whether the device still computes what was launched until now. On a host nothing is left to do."""

    def __init__(self, device: torch.device) -> None:
        self._over: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._over = torch.cuda.Event()
            self._over.record()

    def __call__(self) -> bool:
        return self._over is not None and not self._over.query()


class ToHost:
    """Tensors on their way from the device: copied when they are computed, behind what is launched already. Only that
    copy is waited for, and not what was launched after it."""

    def __init__(self, *tensors: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if any(it.is_cuda for it in tensors):
            tensors = tuple(
                torch.empty(it.shape, dtype=it.dtype, pin_memory=True).copy_(it, non_blocking=True) for it in tensors
            )
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._tensors = tensors

    def read(self) -> tuple[Tensor, ...]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensors
