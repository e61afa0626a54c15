"""Arenas for devices without virtual memory of their own: an old driver, some virtual GPUs, ROCm.

A tensor of which every part is addressed must then be there as a whole: each slot has room for E_max experts in every
layer, whether an adapter fills it or not. That room is taken from the budget when the model is loaded, and an adapter
that uses it costs nothing more. LoRA slabs need no such tensor: each is an allocation of torch's, of its true size.
"""

import contextlib
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from server.weights.arena import ArenaError, PageWork
from server.weights.page_counts import PageCounts
from server.weights.page_pool import PagePool

_PAGE_BYTES = 512  # what torch's allocator rounds to; a small page keeps slots close together


class PaddedArenas:
    page_bytes = _PAGE_BYTES

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def stack(self, num_bytes: int, base_bytes: int, pool: PagePool) -> "PaddedArena":
        return PaddedArena(num_bytes, base_bytes, pool, self._device)

    def slabs(self, num_bytes: int) -> "BlockArena":
        return BlockArena(num_bytes, self._device)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[PageWork]:
        """Nothing is left for later: torch allocates, and mostly from what it has cached."""
        yield PageWork()


class PaddedArena:
    """All there from the start. Its pages beyond the base's leave the pool for good; mapping adds none."""

    page_bytes = _PAGE_BYTES

    def __init__(self, num_bytes: int, base_bytes: int, pool: PagePool, device: torch.device) -> None:
        self._num_base_pages = base_bytes // _PAGE_BYTES  # it ends on one
        padding = -(-num_bytes // _PAGE_BYTES) - self._num_base_pages
        if padding > pool.num_free:
            raise ArenaError(
                "without virtual memory on the device every adapter slot takes room for all the experts that an "
                f"adapter may tune: {padding * _PAGE_BYTES:,} bytes for the slots of one stack, where "
                f"{pool.num_free * _PAGE_BYTES:,} are left of "
                f"{(pool.num_pages + pool.num_withdrawn) * _PAGE_BYTES:,} (adapter_bytes); "
                "lower adapter_slots or max_experts_per_adapter, or raise adapter_bytes"
            )
        pool.withdraw(padding)
        self._bytes = _allocate(num_bytes, device)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return _view(self._bytes, offset, shape, dtype)

    def pages_to_map(self, offset: int, size: int) -> int:
        return 0

    def pages_of(self, size: int) -> int:
        return 0

    def map(self, offset: int, size: int) -> int:
        return 0

    def unmap(self, offset: int, size: int) -> int:
        return 0

    @property
    def num_mapped_pages(self) -> int:
        return self._num_base_pages

    def check(self, ranges: list[tuple[int, int]]) -> None:
        assert all(0 <= offset and offset + size <= len(self._bytes) for offset, size in ranges)

    def close(self) -> None:
        del self._bytes


class BlockArena:
    """Every mapped range is an allocation of its own; offsets are only names. A block goes with its last view.

    Torch's allocator gives a block to work that is launched later on the stream that `map` was called in, which is
    the one that kernels read it in, so nothing has to wait.
    """

    page_bytes = _PAGE_BYTES

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device = device
        self._counts = PageCounts(num_bytes, _PAGE_BYTES)
        self._blocks: dict[int, Tensor] = {}  # by the offset of its range

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        start = max(it for it in self._blocks if it <= offset)
        return _view(self._blocks[start], offset - start, shape, dtype)

    def pages_to_map(self, offset: int, size: int) -> int:
        return len(self._counts.added_by(offset, size))

    def pages_of(self, size: int) -> int:
        return -(-size // _PAGE_BYTES)

    def map(self, offset: int, size: int) -> int:
        assert offset % _PAGE_BYTES == 0  # or two would share a page that is not shared
        self._blocks[offset] = _allocate(size, self._device)
        return len(self._counts.add(offset, size))

    def unmap(self, offset: int, size: int) -> int:
        del self._blocks[offset]
        return len(self._counts.remove(offset, size))

    @property
    def num_mapped_pages(self) -> int:
        return self._counts.num_pages

    def check(self, ranges: list[tuple[int, int]]) -> None:
        self._counts.check(ranges)
        assert {offset: len(block) for offset, block in self._blocks.items()} == dict(ranges)

    def close(self) -> None:
        self._blocks.clear()


def _allocate(num_bytes: int, device: torch.device) -> Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU; its text has the numbers
        raise ArenaError(f"cannot allocate {num_bytes:,} bytes on {device}: {str(error).splitlines()[0]}") from None


def _view(memory: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).view(shape)
