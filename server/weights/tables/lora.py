"""LoRA adapters on the device: one contiguous slab each, at its true rank, and the table that kernels read."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from adapters_store.parts import LowRank
from kernels.adapter_rows import ShapeKey
from kernels.lora import TABLE_FIELDS, LoraSite, LoraWeights, SiteAdapters, Split, table_rows
from server.weights.arena import Arenas
from server.weights.page_pool import PagePool
from server.weights.tables.table import Mapped, to_device

_ALIGN = 64  # bytes: a cache line, and what vector loads like


class LoraTable:
    """Slot s owns the address range [(s - 1) * stride, s * stride); only what its adapter needs is mapped.

    A fixed range per slot means no allocator and no fragmentation: addresses cost nothing.
    """

    kind = LowRank

    def __init__(self, num_slots: int, pool: PagePool, dtype: torch.dtype, arenas: Arenas) -> None:
        self._num_slots, self._pool, self._dtype = num_slots, pool, dtype
        self._stride = pool.num_pages * pool.page_bytes  # no adapter can be larger than the budget
        self._arena = arenas.slabs(num_slots * self._stride)
        self._parts: dict[int, Sequence[LowRank]] = {}  # by slot
        self._bindings: dict[str, list[tuple[LoraSite, Split]]] = {}  # by module
        self.sites: dict[LoraSite, SiteAdapters] = {}
        self._table: Tensor | None = None

    # -- what the model has ---

    def open(self, site: LoraSite) -> SiteAdapters:
        """A place where adapters may act; ops find there what they have for it."""
        self.sites[site] = SiteAdapters()
        return self.sites[site]

    def bind(self, module: str, sites: Iterable[tuple[LoraSite, Split]]) -> None:
        """Say where the weights for one of the base's linears act."""
        self._bindings[module] = list(sites)

    def show_kernels(self, device: torch.device) -> None:
        """Keep what the sites hold as a table too, all in one: [slots + 1, slices of all sites, fields] int64."""
        ends = list(accumulate((len(site.widths) for site in self.sites), initial=0))
        self._table = torch.zeros(self._num_slots + 1, ends[-1], TABLE_FIELDS, dtype=torch.int64, device=device)
        for (site, adapters), start, end in zip(self.sites.items(), ends, ends[1:], strict=False):
            adapters.table = self._table[:, start:end]
            columns = list(accumulate(site.widths, initial=0))
            adapters.offsets = torch.tensor(columns, dtype=torch.int32, device=device)

    # -- Table, for residency ---

    def refusal(self, parts: Sequence[LowRank]) -> str | None:
        return None

    def pages_for(self, slot: int, parts: Sequence[LowRank]) -> int:
        return -(-self._layout(parts)[1] // self._arena.page_bytes)

    def map(self, slot: int, parts: Sequence[LowRank]) -> Mapped:
        self._pool.take(self._arena.map(self._start(slot), self._layout(parts)[1]))
        self._parts[slot] = parts
        places = self._places(slot)
        return Mapped([(tensor, places[tensor.key]) for part in parts for tensor in part.tensors])

    def install(self, slot: int) -> None:
        places = self._places(slot)
        for part in self._parts[slot]:
            weights = LoraWeights(places[part.a.key], places[part.b.key], part.scale)
            for site, split in self._bindings[part.module]:
                held = self.sites[site].by_slot.setdefault(slot, [None] * len(site.widths))
                for index, own in split(weights):
                    held[index] = own
        self._show(slot)

    def unmap(self, slot: int) -> None:
        for adapters in self.sites.values():
            adapters.by_slot.pop(slot, None)
        self._show(slot)
        _, size = self._layout(self._parts.pop(slot))
        self._pool.give_back(self._arena.unmap(self._start(slot), size))

    def has(self, slot: int) -> bool:
        return slot in self._parts

    def shape_key(self, slot: int) -> ShapeKey:
        return ShapeKey(rank=max((part.rank for part in self._parts.get(slot, ())), default=0))

    @property
    def num_mapped_pages(self) -> int:
        return self._arena.num_mapped_pages

    def check(self) -> None:
        self._arena.check([(self._start(slot), self._layout(parts)[1]) for slot, parts in self._parts.items()])
        assert all(slot in self._parts for adapters in self.sites.values() for slot in adapters.by_slot)

    # -- memory ---

    def _show(self, slot: int) -> None:
        """To kernels: what the slot holds now, and at which sites any slot holds anything."""
        if self._table is not None:
            for row in (slot, 0):
                shown = [numbers for it in self.sites.items() for numbers in table_rows(*it, row)]
                to_device(self._table[row], shown)

    def _start(self, slot: int) -> int:
        return (slot - 1) * self._stride

    def _places(self, slot: int) -> dict[str, Tensor]:
        """Of the slot's tensors, by key."""
        parts = self._parts[slot]
        offsets, _ = self._layout(parts)
        return {
            tensor.key: self._arena.tensor(self._start(slot) + offsets[tensor.key], tensor.shape, self._dtype)
            for part in parts
            for tensor in part.tensors
        }

    def _layout(self, parts: Sequence[LowRank]) -> tuple[dict[str, int], int]:
        """Offset of each tensor in its slab, and the slab's size, in bytes."""
        offsets: dict[str, int] = {}
        size = 0
        for part in parts:
            for tensor in part.tensors:
                offsets[tensor.key] = size
                size += -(-tensor.num_elements * self._dtype.itemsize // _ALIGN) * _ALIGN
        return offsets, size
