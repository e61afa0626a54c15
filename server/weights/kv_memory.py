"""Where keys and values lie."""

from math import prod

import numpy as np
import torch
from torch import Tensor


class KVMemory:
    """Makes the tensors of a KV cache: all of one number of blocks, dtype and device."""

    def __init__(self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._num_blocks, self._block_size, self._dtype, self._device = num_blocks, block_size, dtype, device

    def tensor(self, heads: int, dim: int) -> Tensor:
        """[blocks, block size, heads, dim], zeros.

        The host's come from numpy, which takes pages that are not there before they are touched; torch writes all of
        them, so that a cache that nobody uses would fill the memory.
        """
        shape = (self._num_blocks, self._block_size, heads, dim)
        if self._device.type != "cpu":
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        return torch.from_numpy(np.zeros(prod(shape) * self._dtype.itemsize, np.uint8)).view(self._dtype).view(shape)
