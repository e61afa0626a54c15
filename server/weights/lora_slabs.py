"""LoRA adapters on the device: one contiguous slab each, at its true rank, and the tables that kernels read."""

from collections.abc import Iterable
from itertools import accumulate

import torch
from torch import Tensor

from adapters_store.parts import LowRank, TensorRef
from kernels.lora import TABLE_FIELDS, LoraSite, LoraWeights, SiteAdapters, Split, table_rows
from server.weights.arena import Arenas
from server.weights.page_pool import PagePool
from server.weights.tables import to_device

_ALIGN = 64  # bytes: a cache line, and what vector loads like


class LoraSlabs:
    """Slot s owns the address range [(s - 1) * stride, s * stride); only what its adapter needs is mapped.

    A fixed range per slot means no allocator and no fragmentation: addresses cost nothing.
    """

    def __init__(self, num_slots: int, pool: PagePool, dtype: torch.dtype, arenas: Arenas) -> None:
        self._num_slots, self._pool, self._dtype = num_slots, pool, dtype
        self._stride = pool.num_pages * pool.page_bytes  # no adapter can be larger than the budget
        self._arena = arenas.slabs(num_slots * self._stride)
        self._sizes: dict[int, int] = {}  # bytes mapped, by slot
        self._ranks: dict[int, int] = {}  # the highest of its linears', by slot
        self._bindings: dict[str, list[tuple[LoraSite, SiteAdapters, Split]]] = {}  # by module
        self.sites: list[tuple[LoraSite, SiteAdapters]] = []
        self._table: Tensor | None = None

    def bind(self, module: str, sites: Iterable[tuple[LoraSite, SiteAdapters, Split]]) -> None:
        """Say where the weights for one of the base's linears act."""
        self._bindings[module] = list(sites)
        for site, adapters, _ in self._bindings[module]:
            if (site, adapters) not in self.sites:
                self.sites.append((site, adapters))

    def make_table(self, device: torch.device) -> None:
        """Keep the sites' tables for kernels too, all in one: [slots + 1, slices of all sites, fields] int64."""
        ends = [0]
        for site, _ in self.sites:
            ends.append(ends[-1] + len(site.widths))
        self._table = torch.zeros(self._num_slots + 1, ends[-1], TABLE_FIELDS, dtype=torch.int64, device=device)
        for (site, adapters), start, end in zip(self.sites, ends, ends[1:], strict=False):
            adapters.table = self._table[:, start:end]
            columns = list(accumulate(site.widths, initial=0))
            adapters.offsets = torch.tensor(columns, dtype=torch.int32, device=device)

    def pages_for(self, parts: list[LowRank]) -> int:
        return -(-self._layout(parts)[1] // self._arena.page_bytes)

    def map(self, slot: int, parts: list[LowRank]) -> list[tuple[TensorRef, Tensor]]:
        """Make room in `slot`; returns each tensor with the place that it must be copied to."""
        offsets, size = self._layout(parts)
        self._pool.take(self._arena.map(self._start(slot), size))
        self._sizes[slot], self._ranks[slot] = size, max(part.rank for part in parts)
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
            for site, adapters, split in self._bindings[part.module]:
                held = adapters.by_slot.setdefault(slot, [None] * len(site.widths))
                for index, weights in split(LoraWeights(a, b, part.scale)):
                    held[index] = weights
        self._show(slot)

    def unmap(self, slot: int) -> None:
        for _, adapters in self.sites:
            adapters.by_slot.pop(slot, None)
        self._show(slot)
        del self._ranks[slot]
        self._pool.give_back(self._arena.unmap(self._start(slot), self._sizes.pop(slot)))

    def rank(self, slot: int) -> int:
        """0: the slot holds no LoRA."""
        return self._ranks.get(slot, 0)

    def check(self) -> None:
        self._arena.check([(self._start(slot), size) for slot, size in self._sizes.items()])
        assert all(slot in self._sizes for _, adapters in self.sites for slot in adapters.by_slot)

    @property
    def num_mapped_pages(self) -> int:
        return self._arena.num_mapped_pages

    def _show(self, slot: int) -> None:
        """To kernels: what the slot holds now, and at which sites any slot holds anything."""
        if self._table is not None:
            for row in (slot, 0):
                to_device(self._table[row], [numbers for it in self.sites for numbers in table_rows(*it, row)])

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
