"""Small tables that kernels read, updated between steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(target: Tensor, values: Sequence[Any]) -> None:
    """Copy numbers to where kernels read them, after every launch so far and before every later one.

    On a GPU from page-locked memory, which torch keeps until the copy is over: the loop does not wait.
    """
    source = torch.tensor(values, dtype=target.dtype, pin_memory=target.is_cuda)
    target.copy_(source.view(target.shape), non_blocking=True)
