"""LoRA adapters on the device: one contiguous slab each, at its true rank, and the table that kernels read.

Weights of linears, of routers (in float32, as their logits are) and of matrices of routed experts lie in the same slab,
and are found through the same table.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from operator import mul
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapters_store.parts import Assembled, LowRank, Operand, Piece, TensorRef
from kernels.adapter_rows import ShapeKey
from kernels.lora import TABLE_FIELDS, Field, LoraSite, LoraWeights, SiteAdapters, Split, table_rows
from server.weights.arena import Arenas
from server.weights.pace import unhurried
from server.weights.page_pool import PagePool
from server.weights.tables.gains import to_gains
from server.weights.tables.slabs import Slabs, aligned
from server.weights.tables.table import Place, Prepared, on_host


@dataclass(frozen=True)
class _Linear:
    """One of the base's linears, or a matrix of its routed experts: where adapters' weights for it act, of which type
    they are there, and the base's own rows (None: nothing is derived from them)."""

    sites: Sequence[tuple[LoraSite, Split]]
    dtype: torch.dtype
    rows: Callable[[], Tensor] | None


@dataclass
class LoraLayout:
    """As table.Layout. `within` is made by the loading thread when it is first needed."""

    parts: Sequence[LowRank]
    num_bytes: int  # of the slab
    shape: ShapeKey  # what a step with it goes through
    refusal: str | None
    within: "_Within | None" = None


class _Span(NamedTuple):
    """Where an operand lies in its slab: `offset` in elements of its type."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class _Within(NamedTuple):
    """How a slab is divided. Those of one type lie together, in the order in which files have them: so most of an
    adapter, or all of it, is one piece there and here, and is copied as one (runs.py)."""

    operands: Sequence[Operand]  # of all parts, in their order
    spans: Sequence[_Span]
    regions: Sequence[_Span]  # what those of each type fill
    has_gaps: bool  # between them


class _Room(NamedTuple):
    """An operand, and its memory."""

    operand: Operand
    tensor: Tensor


class _Shown(NamedTuple):
    """What kernels will see of an adapter, on the host: its rows of the table; and 1 for each slice of all sites where
    it acts at the site, else 0."""

    rows: Tensor
    acts: "np.ndarray[tuple[int], np.dtype[np.int64]]"


@dataclass
class _Held:
    """One adapter: its room, and what `prepare` made for `install`."""

    layout: LoraLayout
    slab: Tensor
    weights: Sequence[LoraWeights] = ()  # of each part
    entries: Sequence[tuple[SiteAdapters, list[LoraWeights | None]]] = ()  # what each site will have in by_slot
    shown: _Shown | None = None
    is_installed: bool = False


class LoraTable:
    kind = LowRank

    def __init__(self, num_slots: int, pool: PagePool, arenas: Arenas) -> None:
        self._num_slots = num_slots
        self._slabs = Slabs(num_slots, pool, arenas)
        self._held: dict[int, _Held] = {}  # by slot
        self._linears: dict[str, _Linear] = {}  # by module
        self.sites: dict[LoraSite, SiteAdapters] = {}
        self._table: Tensor | None = None
        self._columns: dict[
            LoraSite, slice
        ] = {}  # of each site in the table: a slice of its own for each of its slices
        self._users = np.zeros(0, np.int64)  # by such: how many of those that are installed act at the site

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
        self._columns = {
            site: slice(*it) for site, it in zip(self.sites, zip(ends, ends[1:], strict=False), strict=True)
        }
        self._users = np.zeros(ends[-1], np.int64)
        for site, adapters in self.sites.items():
            adapters.table = self._table[:, self._columns[site]]
            columns = list(accumulate(site.widths, initial=0))
            adapters.offsets = torch.tensor(columns, dtype=torch.int32, device=device)

    # -- Table, for residency ---

    def layout(self, parts: Sequence[LowRank]) -> LoraLayout:
        rank = expert_rank = num_bytes = 0
        refusal: str | None = None
        for part in parts:
            linear, a, b = self._linears[part.module], part.a.shape, part.b.shape
            size = linear.dtype.itemsize
            num_bytes += aligned(prod(a) * size) + aligned(prod(b) * size)
            if len(a) == 3:
                expert_rank = max(expert_rank, a[-2])
            else:
                rank = max(rank, a[-2])
            if part.magnitude is not None:
                num_bytes += aligned(prod(part.magnitude.shape) * 4)  # what it becomes is float32
                if linear.rows is None and refusal is None:
                    refusal = f"DoRA on {part.module} is not served; merge the adapter into its base"
        return LoraLayout(parts, num_bytes, ShapeKey(rank=rank, expert_rank=expert_rank), refusal)

    def pages_for(self, layout: LoraLayout) -> int:
        return self._slabs.pages_for(layout.num_bytes)

    def map(self, slot: int, layout: LoraLayout) -> None:
        self._held[slot] = _Held(layout, self._slabs.map(slot, layout.num_bytes))

    def prepare(self, slot: int) -> Prepared:
        held = self._held[slot]
        layout = held.layout
        if layout.within is None:
            layout.within = self._divide(layout.parts)
        operands, spans, regions, has_gaps = layout.within
        typed = {it.dtype: held.slab.view(it.dtype) for it in regions}
        rooms = [_Room(*it) for it in zip(operands, (_view(typed, it) for it in unhurried(spans)), strict=True)]
        rest = iter(rooms)
        held.weights = [
            LoraWeights(
                next(rest).tensor, next(rest).tensor, part.scale,
                next(rest).tensor if part.magnitude is not None else None,
            )
            for part in unhurried(held.layout.parts)
        ]  # fmt: skip
        self._prepare_install(held)
        assembled = [it for it in rooms if isinstance(it.operand, Assembled)]
        filled = [_view(typed, it) for it in regions]
        open_ = [it.tensor for it in assembled if isinstance(it.operand, Assembled) and not it.operand.is_covered]
        return Prepared(
            places=(place for room in unhurried(rooms) for place in _places(room)),
            cleared=filled if has_gaps else open_,
            derive=[partial(_scale, assembled), partial(self._derive_gains, held)],
            checked=filled,
        )

    def install(self, slot: int) -> None:
        held = self._held[slot]
        for adapters, entry in held.entries:
            adapters.by_slot[slot] = entry
        held.is_installed = True
        if self._table is not None and held.shown is not None:
            self._table[slot].copy_(held.shown.rows, non_blocking=True)
            self._users += held.shown.acts
            self._show_where_any_acts(self._table)

    def unmap(self, slot: int) -> None:
        held = self._held.pop(slot)
        if held.is_installed:
            for adapters, _ in held.entries:
                del adapters.by_slot[slot]
            if self._table is not None and held.shown is not None:
                self._table[slot].zero_()
                self._users -= held.shown.acts
                self._show_where_any_acts(self._table)
        self._slabs.unmap(slot)

    def has(self, slot: int) -> bool:
        return slot in self._held

    def shape_key(self, slot: int) -> ShapeKey:
        held = self._held.get(slot)
        return held.layout.shape if held else ShapeKey()

    @property
    def num_mapped_pages(self) -> int:
        return self._slabs.num_mapped_pages

    def check(self) -> None:
        self._slabs.check()
        seen = {slot for adapters in self.sites.values() for slot in adapters.by_slot}
        assert seen == {slot for slot, held in self._held.items() if held.is_installed and held.entries}
        if self._table is not None and not self._table.is_cuda:
            shown = [0, *sorted(seen)]  # most slots are empty, and there may be a thousand
            empty = torch.ones(self._num_slots + 1, dtype=torch.bool)
            empty[shown] = False
            assert not self._table[empty].any()
            for slot in shown:
                rows = [row for it in self.sites.items() for row in table_rows(*it, slot)]
                assert self._table[slot].tolist() == [list(row) for row in rows]

    def _divide(self, parts: Sequence[LowRank]) -> _Within:
        wanted: list[tuple[Operand, torch.dtype]] = []
        for part in unhurried(parts):
            dtype = self._linears[part.module].dtype
            wanted += [(part.a, dtype), (part.b, dtype)]
            if part.magnitude is not None:
                wanted.append((part.magnitude, torch.float32))
        dtypes = list(dict.fromkeys(dtype for _, dtype in wanted))
        spans: dict[int, _Span] = {}
        regions: list[_Span] = []
        offset, has_gaps = 0, False
        for dtype in dtypes:
            of_this = [index for index, it in enumerate(wanted) if it[1] is dtype]
            begin = end = offset
            for index in unhurried(sorted(of_this, key=lambda it: _stored_at(wanted[it][0]))):
                shape = wanted[index][0].shape
                has_gaps = has_gaps or end != offset
                spans[index] = _Span(dtype, tuple(shape), _strides(shape), offset // dtype.itemsize)
                end = offset + prod(shape) * dtype.itemsize
                offset = aligned(end)
            regions.append(_Span(dtype, ((end - begin) // dtype.itemsize,), (1,), begin // dtype.itemsize))
        return _Within([it for it, _ in wanted], [spans[index] for index in range(len(wanted))], regions, has_gaps)

    def _prepare_install(self, held: _Held) -> None:
        by_site: dict[LoraSite, list[LoraWeights | None]] = {}
        for part, weights in unhurried(zip(held.layout.parts, held.weights, strict=True)):
            for site, split in self._linears[part.module].sites:
                for index, its in split(weights):
                    by_site.setdefault(site, [None] * len(site.widths))[index] = its
        held.entries = [(self.sites[site], entry) for site, entry in by_site.items()]
        if self._table is None:
            return
        shown = _Shown(on_host(self._table.shape[1:], like=self._table), np.zeros_like(self._users))
        rows = shown.rows.numpy()
        for site, entry in unhurried(by_site.items()):
            shown.acts[self._columns[site]] = 1
            rows[self._columns[site]] = table_rows(site, SiteAdapters({1: entry}), 1)
        held.shown = shown

    def _derive_gains(self, held: _Held) -> None:
        for part, its in zip(held.layout.parts, held.weights, strict=True):
            if its.gain is not None:
                rows = self._linears[part.module].rows
                assert rows is not None  # it would have been refused
                to_gains(its, rows(), part.module)

    def _show_where_any_acts(self, table: Tensor) -> None:
        """Row 0, for kernels."""
        shown = on_host(table.shape[1:], like=table)
        shown.numpy()[:, Field.A] = self._users > 0
        table[0].copy_(shown, non_blocking=True)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a tensor in one piece."""
    return tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1]


def _view(typed: dict[torch.dtype, Tensor], span: _Span) -> Tensor:
    slab = typed[span.dtype]
    return slab.as_strided(span.shape, span.strides, slab.storage_offset() + span.offset)


def _stored_at(operand: Operand) -> tuple[str, int]:
    if isinstance(operand, TensorRef):
        return operand.file, operand.offset
    return (operand.pieces[0].tensor.file, operand.pieces[0].tensor.offset) if operand.pieces else ("", 0)


def _places(room: _Room) -> Iterator[Place]:
    """Where each of its pieces goes."""
    if isinstance(room.operand, TensorRef):
        yield room.operand, room.tensor
        return
    for piece in room.operand.pieces:
        yield piece.tensor, _within(room.tensor, piece)


def _scale(rooms: Sequence[_Room]) -> None:
    """Pieces that were trained at another scale than the part's."""
    for room in rooms:
        for piece in room.operand.pieces:
            if piece.factor != 1.0:
                _within(room.tensor, piece).mul_(piece.factor)


def _within(room: Tensor, piece: Piece) -> Tensor:
    return room[tuple(slice(at, at + size) for at, size in zip(piece.start, piece.tensor.shape, strict=True))]
