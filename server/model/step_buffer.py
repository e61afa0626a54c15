"""Numbers of a step: named fields, filled on the host and copied to the device in one piece."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGN = 4  # integers: 16 bytes, so that kernels may load vectors
Numbers = np.ndarray[Any, Any]


class StepBuffer:
    """The device's side never moves, so a captured graph finds each step's numbers where it found those of the step
    that it was captured with. The host has two sides that take turns: while one is copied from, the other is filled.

    Fields lie in the order in which they are named, each from a multiple of 16 bytes on. Nothing is cleared: what a
    step does not stage is what an earlier one left.
    """

    def __init__(self, fields: Mapping[str, int], device: torch.device) -> None:
        """fields: the most numbers of each, int32 or float32."""
        self._ranges: dict[str, tuple[int, int]] = {}
        total = 0
        for name, size in fields.items():
            self._ranges[name] = (total, total + size)
            total += -(-size // _ALIGN) * _ALIGN
        self._device = torch.zeros(total, dtype=torch.int32, device=device)
        self._sides = [_HostSide(total, device) for _ in range(2)]

    def begin(self) -> None:
        """Fill the side that was copied from longest ago. Waits for that copy, which is mostly long over."""
        self._sides.reverse()
        self._sides[0].wait()

    def stage(
        self, name: str, values: Sequence[int] | Numbers, count: int | None = None, filler: int = 0, at: int = 0
    ) -> None:
        """Write `values` into a field, from number `at` on, and `filler` behind them up to `count` numbers. Integers,
        or an array of float32."""
        begin, end = self._ranges[name]
        begin += at
        assert begin + (count or len(values)) <= end, (name, at, len(values), count, end - begin)
        numbers = self._sides[0].numbers
        if isinstance(values, np.ndarray) and values.dtype == np.float32:
            values = values.view(np.int32)
        numbers[begin : begin + len(values)] = values
        if count is not None:
            numbers[begin + len(values) : begin + count] = filler

    def send(self, last: str, size: int) -> None:
        """Copy all that was staged, up to so many numbers of field `last`."""
        end = self._ranges[last][0] + size
        self._sides[0].copy_to(self._device[:end])

    def view(self, name: str, size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """The first `size` numbers of a field on the device."""
        begin, end = self._ranges[name]
        assert begin + size <= end, (name, size, end - begin)
        return self._device[begin : begin + size].view(dtype)


class _HostSide:
    def __init__(self, size: int, device: torch.device) -> None:
        self._memory = torch.zeros(size, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
        self.numbers = self._memory.numpy()
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # one never recorded is over

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def copy_to(self, target: Tensor) -> None:
        target.copy_(self._memory[: len(target)], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
