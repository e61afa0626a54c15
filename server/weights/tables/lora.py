"""LoRA adapters on the device: one contiguous slab each, at its true rank, and the table that kernels read.

Weights of linears, of routers (in float32, as their logits are) and of matrices of routed experts lie in the same slab,
and are found through the same table.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from adapters_store.parts import Assembled, LowRank, Operand, Piece, TensorRef
from kernels.adapter_rows import ShapeKey
from kernels.lora import TABLE_FIELDS, LoraSite, LoraWeights, SiteAdapters, Split, table_rows
from server.weights.arena import Arenas
from server.weights.page_pool import PagePool
from server.weights.tables.gains import to_gains
from server.weights.tables.slabs import Slabs, Wanted
from server.weights.tables.table import Mapped, to_device


@dataclass(frozen=True)
class _Linear:
    """One of the base's linears, or a matrix of its routed experts: where adapters' weights for it act, of which type
    they are there, and the base's own rows (None: nothing is derived from them)."""

    sites: Sequence[tuple[LoraSite, Split]]
    dtype: torch.dtype
    rows: Callable[[], Tensor] | None


@dataclass(frozen=True)
class _Held:
    """One adapter: its parts, where the weights of each lie, and what a step with it goes through."""

    parts: Sequence[LowRank]
    weights: Sequence[LoraWeights]
    shape: ShapeKey


class LoraTable:
    kind = LowRank

    def __init__(self, num_slots: int, pool: PagePool, arenas: Arenas) -> None:
        self._num_slots = num_slots
        self._slabs = Slabs(num_slots, pool, arenas)
        self._held: dict[int, _Held] = {}  # by slot
        self._linears: dict[str, _Linear] = {}  # by module
        self.sites: dict[LoraSite, SiteAdapters] = {}
        self._table: Tensor | None = None

    # -- what the model has ---

    def open(self, site: LoraSite) -> SiteAdapters:
        """A place where adapters may act; ops find there what they have for it."""
        self.sites[site] = SiteAdapters()
        return self.sites[site]

    def bind(
        self,
        module: str,
        sites: Sequence[tuple[LoraSite, Split]],
        dtype: torch.dtype,
        rows: Callable[[], Tensor] | None = None,
    ) -> None:
        """Say where the weights for one of the base's linears act. rows [out, in]: the base's own, without bias."""
        self._linears[module] = _Linear(sites, dtype, rows)

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
        refused = [it.module for it in parts if it.magnitude is not None and self._linears[it.module].rows is None]
        return f"DoRA on {refused[0]} is not served; merge the adapter into its base" if refused else None

    def pages_for(self, slot: int, parts: Sequence[LowRank]) -> int:
        return self._slabs.pages_for(self._wanted(parts))

    def map(self, slot: int, parts: Sequence[LowRank]) -> Mapped:
        rooms = self._slabs.map(slot, self._wanted(parts))
        rest = iter(rooms)
        weights = [
            LoraWeights(next(rest), next(rest), part.scale, next(rest) if part.magnitude is not None else None)
            for part in parts
        ]
        self._held[slot] = _Held(parts, weights, _shape(parts))
        held = list(zip((operand for part in parts for operand in part.operands), rooms, strict=True))
        return Mapped(
            places=(place for operand, room in held for place in _places(operand, room)),
            cleared=[room for operand, room in held if isinstance(operand, Assembled) and not operand.is_covered],
            derive=[partial(_scale, held), partial(self._derive_gains, parts, weights)],
        )

    def install(self, slot: int) -> None:
        held = self._held[slot]
        for part, weights in zip(held.parts, held.weights, strict=True):
            for site, split in self._linears[part.module].sites:
                for index, its in split(weights):
                    self.sites[site].by_slot.setdefault(slot, [None] * len(site.widths))[index] = its
        self._show(slot)

    def unmap(self, slot: int) -> None:
        for adapters in self.sites.values():
            adapters.by_slot.pop(slot, None)
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
        assert all(slot in self._held for adapters in self.sites.values() for slot in adapters.by_slot)

    def _wanted(self, parts: Sequence[LowRank]) -> list[Wanted]:
        """Room for the operands of all, in order. What magnitudes become is float32."""
        wanted: list[Wanted] = []
        for part in parts:
            dtype = self._linears[part.module].dtype
            wanted += [(part.a.shape, dtype), (part.b.shape, dtype)]
            if part.magnitude is not None:
                wanted.append((part.magnitude.shape, torch.float32))
        return wanted

    def _derive_gains(self, parts: Sequence[LowRank], weights: Sequence[LoraWeights]) -> None:
        for part, its in zip(parts, weights, strict=True):
            if its.gain is not None:
                rows = self._linears[part.module].rows
                assert rows is not None  # it would have been refused
                to_gains(its, rows(), part.module)

    def _show(self, slot: int) -> None:
        """To kernels: what the slot holds now, and at which sites any slot holds anything."""
        if self._table is not None:
            for row in (slot, 0):
                shown = [numbers for it in self.sites.items() for numbers in table_rows(*it, row)]
                to_device(self._table[row], shown)


def _shape(parts: Sequence[LowRank]) -> ShapeKey:
    inside = [part.rank for part in parts if part.is_in_experts]
    outside = [part.rank for part in parts if not part.is_in_experts]
    return ShapeKey(rank=max(outside, default=0), expert_rank=max(inside, default=0))


def _places(operand: Operand, room: Tensor) -> Iterator[tuple[TensorRef, Tensor]]:
    """Where each of its pieces goes."""
    for piece in operand.pieces:
        yield piece.tensor, _within(room, piece)


def _scale(held: Sequence[tuple[Operand, Tensor]]) -> None:
    """Pieces that were trained at another scale than the part's."""
    for operand, room in held:
        for piece in operand.pieces:
            if piece.factor != 1.0:
                _within(room, piece).mul_(piece.factor)


def _within(room: Tensor, piece: Piece) -> Tensor:
    return room[tuple(slice(at, at + size) for at, size in zip(piece.start, piece.tensor.shape, strict=True))]
