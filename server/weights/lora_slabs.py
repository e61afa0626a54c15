"""LoRA adapters on the device: one contiguous slab each, at its true rank, and the table that kernels read."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adapters_store.parts import LowRank, TensorRef
from kernels.lora import LoraWeights
from server.weights.arena import HostArena
from server.weights.page_pool import PagePool

_ALIGN = 64  # bytes: a cache line, and what vector loads like


class LoraSlabs:
    """Slot s owns the address range [(s - 1) * stride, s * stride); only what its adapter needs is mapped.

    A fixed range per slot means no allocator and no fragmentation: addresses cost nothing.
    """

    def __init__(self, num_slots: int, pool: PagePool, dtype: torch.dtype) -> None:
        self._pool = pool
        self._dtype = dtype
        self._stride = pool.num_pages * pool.page_bytes  # no adapter can be larger than the budget
        self._arena = HostArena(num_slots * self._stride)
        self._sizes: dict[int, int] = {}  # bytes mapped, by slot
        self._table: dict[str, dict[int, LoraWeights]] = {}  # module -> slot -> weights

    def pages_for(self, parts: list[LowRank]) -> int:
        return -(-self._layout(parts)[1] // self._arena.page_bytes)

    def map(self, slot: int, parts: list[LowRank]) -> list[tuple[TensorRef, Tensor]]:
        """Make room in `slot`; returns each tensor with the place that it must be copied to."""
        offsets, size = self._layout(parts)
        self._pool.take(self._arena.map(self._start(slot), size))
        self._sizes[slot] = size
        places = []
        for part in parts:
            for tensor in (part.a, part.b):
                place = self._arena.tensor(self._start(slot) + offsets[tensor.key], tensor.shape, self._dtype)
                places.append((tensor, place))
        return places

    def install(self, slot: int, parts: list[LowRank]) -> None:
        """Let kernels see the slot: its bytes are in place."""
        offsets, _ = self._layout(parts)
        for part in parts:
            a, b = (
                self._arena.tensor(self._start(slot) + offsets[tensor.key], tensor.shape, self._dtype)
                for tensor in (part.a, part.b)
            )
            self._table.setdefault(part.module, {})[slot] = LoraWeights(a, b, part.scale)

    def unmap(self, slot: int) -> None:
        for by_slot in self._table.values():
            by_slot.pop(slot, None)
        self._pool.give_back(self._arena.unmap(self._start(slot), self._sizes.pop(slot)))

    def weights(self, module: str) -> Mapping[int, LoraWeights]:
        return self._table.get(module, {})

    def has(self, slot: int) -> bool:
        return slot in self._sizes

    def check(self) -> None:
        self._arena.check([(self._start(slot), size) for slot, size in self._sizes.items()])
        assert all(slot in self._sizes for by_slot in self._table.values() for slot in by_slot)

    @property
    def num_mapped_pages(self) -> int:
        return self._arena.num_mapped_pages

    def _start(self, slot: int) -> int:
        return (slot - 1) * self._stride

    def _layout(self, parts: list[LowRank]) -> tuple[dict[str, int], int]:
        """Offset of each tensor in its slab, and the slab's size, in bytes."""
        offsets: dict[str, int] = {}
        size = 0
        for part in parts:
            for tensor in (part.a, part.b):
                offsets[tensor.key] = size
                size += -(-tensor.num_elements * self._dtype.itemsize // _ALIGN) * _ALIGN
        return offsets, size
