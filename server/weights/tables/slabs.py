"""Memory of small parts: one contiguous range an adapter, of its true size."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from server.weights.arena import Arenas
from server.weights.page_pool import PagePool

_ALIGN = 64  # bytes: a cache line, and what vector loads like
Wanted = tuple[tuple[int, ...], torch.dtype]  # a tensor: its shape and type


class Slabs:
    """Slot s owns the address range [(s - 1) * stride, s * stride); only what its adapter needs is mapped.

    A fixed range per slot means no allocator and no fragmentation: addresses cost nothing.
    """

    def __init__(self, num_slots: int, pool: PagePool, arenas: Arenas) -> None:
        self._pool = pool
        self._stride = pool.num_pages * pool.page_bytes  # no adapter can be larger than the budget
        self._arena = arenas.slabs(num_slots * self._stride)
        self._sizes: dict[int, int] = {}  # in bytes, by slot

    def pages_for(self, wanted: Sequence[Wanted]) -> int:
        return -(-sum(map(_aligned_bytes, wanted)) // self._arena.page_bytes)

    def map(self, slot: int, wanted: Sequence[Wanted]) -> list[Tensor]:
        """The tensors, in order, with undefined contents. Raises ArenaError, and then nothing has changed."""
        size = sum(map(_aligned_bytes, wanted))
        self._pool.take(self._arena.map(self._start(slot), size))
        self._sizes[slot] = size
        tensors: list[Tensor] = []
        offset = self._start(slot)
        for it in wanted:
            tensors.append(self._arena.tensor(offset, *it))
            offset += _aligned_bytes(it)
        return tensors

    def unmap(self, slot: int) -> None:
        self._pool.give_back(self._arena.unmap(self._start(slot), self._sizes.pop(slot)))

    @property
    def num_mapped_pages(self) -> int:
        return self._arena.num_mapped_pages

    def check(self) -> None:
        self._arena.check([(self._start(slot), size) for slot, size in self._sizes.items()])

    def _start(self, slot: int) -> int:
        return (slot - 1) * self._stride


def _aligned_bytes(wanted: Wanted) -> int:
    shape, dtype = wanted
    return -(-prod(shape) * dtype.itemsize // _ALIGN) * _ALIGN
