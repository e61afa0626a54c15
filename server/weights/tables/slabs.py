"""Memory of small parts: one contiguous range an adapter, of its true size."""

import torch
from torch import Tensor

from server.weights.arena import Arenas
from server.weights.page_pool import PagePool

_ALIGN = 64  # bytes: a cache line, and what vector loads like


class Slabs:
    """Slot s owns the address range [(s - 1) * stride, s * stride); only what its adapter needs is mapped.

    A fixed range per slot means no allocator and no fragmentation: addresses cost nothing.
    """

    def __init__(self, num_slots: int, pool: PagePool, arenas: Arenas) -> None:
        self._pool = pool
        self._stride = pool.num_pages * pool.page_bytes  # no adapter can be larger than the budget
        self._arena = arenas.slabs(num_slots * self._stride)
        self._sizes: dict[int, int] = {}  # in bytes, by slot

    def pages_for(self, num_bytes: int) -> int:
        return self._arena.pages_of(num_bytes)

    def map(self, slot: int, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, with undefined contents. Raises ArenaError, and then nothing has changed."""
        self._pool.take(self._arena.map(self._start(slot), num_bytes))
        self._sizes[slot] = num_bytes
        return self._arena.tensor(self._start(slot), (num_bytes,), torch.uint8)

    def unmap(self, slot: int) -> None:
        self._pool.give_back(self._arena.unmap(self._start(slot), self._sizes.pop(slot)))

    @property
    def num_mapped_pages(self) -> int:
        return self._arena.num_mapped_pages

    def check(self) -> None:
        self._arena.check([(self._start(slot), size) for slot, size in self._sizes.items()])

    def _start(self, slot: int) -> int:
        return (slot - 1) * self._stride


def aligned(num_bytes: int) -> int:
    """The room that a tensor of so many bytes takes in a slab."""
    return -(-num_bytes // _ALIGN) * _ALIGN
