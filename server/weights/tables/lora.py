"""LoRA adapters on the device: one contiguous slab each, at its true rank, and the table that kernels read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from adapters_store.parts import LowRank
from kernels.adapter_rows import ShapeKey
from kernels.lora import TABLE_FIELDS, LoraSite, LoraWeights, SiteAdapters, Split, table_rows
from server.weights.arena import Arenas
from server.weights.page_pool import PagePool
from server.weights.tables.slabs import Slabs, Wanted
from server.weights.tables.table import Mapped, to_device


@dataclass(frozen=True)
class _Held:
    """One adapter: its parts, where A and B of each lie, and what a step with it goes through."""

    parts: Sequence[LowRank]
    pairs: Sequence[tuple[Tensor, Tensor]]
    shape: ShapeKey


class LoraTable:
    kind = LowRank

    def __init__(self, num_slots: int, pool: PagePool, dtype: torch.dtype, arenas: Arenas) -> None:
        self._num_slots, self._dtype = num_slots, dtype
        self._slabs = Slabs(num_slots, pool, arenas)
        self._held: dict[int, _Held] = {}  # by slot
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
        return self._slabs.pages_for(self._wanted(parts))

    def map(self, slot: int, parts: Sequence[LowRank]) -> Mapped:
        places = self._slabs.map(slot, self._wanted(parts))
        shape = ShapeKey(rank=max(part.rank for part in parts))
        self._held[slot] = _Held(parts, list(zip(places[::2], places[1::2], strict=True)), shape)
        tensors = (tensor for part in parts for tensor in part.tensors)
        return Mapped(list(zip(tensors, places, strict=True)))

    def install(self, slot: int) -> None:
        held = self._held[slot]
        for part, (a, b) in zip(held.parts, held.pairs, strict=True):
            for site, split in self._bindings[part.module]:
                slices = self.sites[site].by_entry.setdefault(slot, [None] * len(site.widths))
                for index, weights in split(LoraWeights(a, b, part.scale)):
                    slices[index] = weights
        self._show(slot)

    def unmap(self, slot: int) -> None:
        for adapters in self.sites.values():
            adapters.by_entry.pop(slot, None)
        self._show(slot)
        del self._held[slot]
        self._slabs.unmap(slot)

    def has(self, slot: int) -> bool:
        return slot in self._held

    def shape_key(self, slot: int) -> ShapeKey:
        held = self._held.get(slot)
        return held.shape if held else ShapeKey()

    @property
    def num_mapped_pages(self) -> int:
        return self._slabs.num_mapped_pages

    def check(self) -> None:
        self._slabs.check()
        assert all(slot in self._held for adapters in self.sites.values() for slot in adapters.by_entry)

    def _wanted(self, parts: Sequence[LowRank]) -> list[Wanted]:
        return [(tensor.shape, self._dtype) for part in parts for tensor in part.tensors]

    def _show(self, slot: int) -> None:
        """To kernels: what the slot holds now, and at which sites any slot holds anything."""
        if self._table is not None:
            for row in (slot, 0):
                shown = [numbers for it in self.sites.items() for numbers in table_rows(*it, row)]
                to_device(self._table[row], shown)
