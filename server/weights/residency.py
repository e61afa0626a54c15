"""Which adapters are on the device: pins, least-recently-used eviction, transfers under way."""

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain
from typing import Any

from adapters_store.parts import AdapterPackage, Part, PartKind, SourceFile, by_kind
from adapters_store.ref import AdapterRef
from kernels.adapter_rows import ShapeKey
from server.engine.messages import AdapterOnDevice
from server.engine.request import Slot
from server.engine.residency import AdapterFailed, Wait
from server.weights.arena import ArenaError, Arenas
from server.weights.page_pool import PagePool
from server.weights.staging import Copier
from server.weights.tables.table import Mapped, Table
from server.weights.transfer import Transfer, TransferThread


class State(enum.StrEnum):
    """absent -> loading -> resident -> absent; a failed transfer goes back to absent by way of failed."""

    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"
    FAILED = "failed"


@dataclass
class _Adapter:
    ref: AdapterRef
    files: tuple[SourceFile, ...] = ()
    parts: dict[PartKind, list[Any]] = field(default_factory=dict)
    state: State = State.ABSENT
    slot: Slot = 0
    pages: int = 0
    pins: int = 0
    pinned: bool = False  # stays when nobody uses it, unlike one that only has pins
    transfer: Transfer | None = None
    error: str = ""
    forgotten: bool = False  # nobody wants it, but its transfer must end before its room is reused


class DeviceResidency:
    """Implements the engine's Residency protocol, and the model's AdapterTables.

    An adapter's parts are divided among the tables by kind; it is on the device when all of them are. Pages are counted
    here and at once; the transfer thread maps and unmaps them, in the order in which they were counted: an eviction's
    before those of the transfer that it makes room for.
    """

    def __init__(
        self,
        num_slots: int,
        pool: PagePool,
        tables: Sequence[Table],
        arenas: Arenas,
        transfers: TransferThread,
        copier: Copier,
    ) -> None:
        self._pool, self._tables = pool, tuple(tables)
        self._arenas, self._transfers, self._copier = arenas, transfers, copier
        self._adapters: dict[AdapterRef, _Adapter] = {}  # all that are known: never gone through in a step
        # those of each state, so that a step looks at what is on the device and at no others; residents by last use
        self._in: dict[State, dict[AdapterRef, _Adapter]] = {it: {} for it in State if it is not State.ABSENT}
        self._wanted: dict[AdapterRef, _Adapter] = {}  # pinned and absent: tried in every poll
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots, 0, -1))  # popped from the end, the lowest first

    # -- Residency, for the scheduler -----------------------------------------------------------

    def register(self, ref: AdapterRef, package: AdapterPackage, pinned: bool = False) -> None:
        known = self._adapters.setdefault(ref, _Adapter(ref))
        # the same weights, perhaps in other files; looked at when a transfer starts
        known.files, known.parts = package.files, by_kind(package.parts)
        known.forgotten = False  # it may have been, while its transfer runs
        known.pinned = pinned
        # what failed was the old place; nobody need hear of it now
        self._enter(known, State.ABSENT if known.state is State.FAILED else known.state)

    def unpin(self, ref: AdapterRef) -> None:
        self._adapters[ref].pinned = False
        self._wanted.pop(ref, None)

    def forget(self, ref: AdapterRef) -> int:
        adapter = self._adapters[ref]
        assert adapter.pins == 0
        self.unpin(ref)
        num_bytes = adapter.pages * self._pool.page_bytes
        if adapter.state is State.LOADING:
            adapter.forgotten = True
            return num_bytes
        if adapter.state is State.RESIDENT:
            self._evict(adapter)
        self._enter(adapter, State.ABSENT)
        del self._adapters[ref]
        return num_bytes

    def refusal(self, refs: Collection[AdapterRef]) -> str | None:
        if len(refs) < 2:
            return None  # one alone says so itself when it is asked for
        if len(refs) > self._num_slots:
            return f"the request needs {len(refs)} adapters at once; there are {self._num_slots} slots (adapter_slots)"
        needed = sum(self._pages_for(1, self._adapters[ref]) for ref in refs)
        if needed <= self._pool.num_pages:
            return None
        return f"the request's {len(refs)} adapters together: {self._too_large(needed)}"

    def poll(self) -> None:
        for adapter in tuple(self._in[State.LOADING].values()):
            if adapter.transfer is not None and adapter.transfer.done:
                self._finish_transfer(adapter, adapter.transfer)
        for adapter in tuple(self._wanted.values()):
            try:
                self._start_transfer(adapter)
            except AdapterFailed as error:  # told to the first who asks for it, and not tried again until then
                self._fail(adapter, error.reason)

    def acquire(self, ref: AdapterRef) -> Slot | Wait:
        adapter = self._adapters[ref]
        if adapter.state is State.FAILED:
            self._enter(adapter, State.ABSENT)
            raise AdapterFailed(ref, adapter.error)
        if adapter.state is State.ABSENT and not self._start_transfer(adapter):
            return Wait.NO_ROOM
        if adapter.state is State.LOADING:
            return Wait.LOADING
        adapter.pins += 1
        residents = self._in[State.RESIDENT]
        residents[ref] = residents.pop(ref)  # most recently used
        return adapter.slot

    def release(self, ref: AdapterRef) -> None:
        adapter = self._adapters[ref]
        assert adapter.pins > 0
        adapter.pins -= 1

    def is_loading(self) -> bool:
        return bool(self._in[State.LOADING])

    def report(self) -> tuple[AdapterOnDevice, ...]:
        return tuple(
            AdapterOnDevice(adapter.ref, adapter.state.value, adapter.pages * self._pool.page_bytes, adapter.pins)
            for adapter in chain.from_iterable(it.values() for it in self._in.values())
        )

    def check(self) -> None:
        for state, adapters in self._in.items():
            assert adapters == {ref: it for ref, it in self._adapters.items() if it.state is state}
        wanted = {ref: it for ref, it in self._adapters.items() if it.pinned and it.state is State.ABSENT}
        assert self._wanted == wanted
        assert all((it.transfer is not None) == (it.state is State.LOADING) for it in self._adapters.values())
        holding = [*self._in[State.LOADING].values(), *self._in[State.RESIDENT].values()]
        slots = [adapter.slot for adapter in holding] + self._free_slots
        assert len(set(slots)) == len(slots) and 0 not in slots
        assert all(a.pins == 0 or a.state is State.RESIDENT for a in self._adapters.values())
        assert self._pool.num_used == sum(table.num_mapped_pages for table in self._tables)
        for table in self._tables:
            table.check()
            assert all(table.has(a.slot) == (table.kind in a.parts) for a in holding)

    # -- for checks -----------------------------------------------------------

    def source(self, ref: AdapterRef) -> tuple[tuple[SourceFile, ...], list[Part]]:
        """Of one that is registered: its files, and what they hold of it."""
        adapter = self._adapters[ref]
        return adapter.files, list(chain.from_iterable(adapter.parts.values()))

    # -- AdapterTables, for the model -----------------------------------------------------------

    def shape_key(self, slot: Slot) -> ShapeKey:
        return reduce(ShapeKey.joined, (table.shape_key(slot) for table in self._tables))

    # -- transfers -----------------------------------------------------------

    def _start_transfer(self, adapter: _Adapter) -> bool:
        """Make room, evicting if need be, and start to copy. False if what is in the way is pinned or loading.

        Raises AdapterFailed where no wait would help.
        """
        slot = self._make_room(adapter)
        if slot is None:
            return False
        used = self._pool.num_used
        try:
            with self._arenas.deferred() as pages:
                mapped = self._map(slot, adapter)
        except ArenaError as error:
            self._give_back(slot)
            raise AdapterFailed(adapter.ref, str(error)) from None
        adapter.slot, adapter.pages = slot, self._pool.num_used - used
        self._enter(adapter, State.LOADING)
        places = chain.from_iterable(it.places for it in mapped)
        cleared = [tensor for it in mapped for tensor in it.cleared]
        derive = [step for it in mapped for step in it.derive]
        adapter.transfer = Transfer(adapter.files, places, pages, self._copier.begin(), cleared, derive)
        self._transfers.start(adapter.transfer)
        return True

    def _map(self, slot: Slot, adapter: _Adapter) -> list[Mapped]:
        """Room in every table that has parts of it; or ArenaError, and in none."""
        mapped: list[tuple[Table, Mapped]] = []
        try:
            for table, parts in self._divided(adapter):
                mapped.append((table, table.map(slot, parts)))
        except ArenaError:
            for table, _ in mapped:
                table.unmap(slot)
            raise
        return [it for _, it in mapped]

    def _divided(self, adapter: _Adapter) -> list[tuple[Table, list[Any]]]:
        """Its parts, by table."""
        return [(table, adapter.parts[table.kind]) for table in self._tables if table.kind in adapter.parts]

    def _give_back(self, slot: Slot) -> None:
        self._free_slots.append(slot)
        self._free_slots.sort(reverse=True)

    def _make_room(self, adapter: _Adapter) -> Slot | None:
        victims = [it for it in self._in[State.RESIDENT].values() if it.pins == 0 and not it.pinned]
        problem = self._refusal(adapter)
        if problem is not None:
            raise AdapterFailed(adapter.ref, problem)
        # evict nothing in vain: first see whether evicting every idle adapter would do
        if not self._free_slots and not victims:
            return None
        needed = self._pages_for(self._free_slots[-1] if self._free_slots else victims[0].slot, adapter)
        if needed > self._pool.num_pages:
            raise AdapterFailed(adapter.ref, self._too_large(needed))
        if needed > self._pool.num_free + sum(victim.pages for victim in victims):
            return None
        while not self._free_slots or self._pages_for(self._free_slots[-1], adapter) > self._pool.num_free:
            if not victims:
                return None  # pages shared with a neighbour made the estimate short by a page or two
            self._evict(victims.pop(0))
        return self._free_slots.pop()

    def _refusal(self, adapter: _Adapter) -> str | None:
        """Why it can never be placed, if so."""
        homeless = set(adapter.parts) - {table.kind for table in self._tables}
        if homeless:
            return f"this engine has no table for {', '.join(sorted(kind.__name__ for kind in homeless))}"
        return next(filter(None, (table.refusal(parts) for table, parts in self._divided(adapter))), None)

    def _pages_for(self, slot: Slot, adapter: _Adapter) -> int:
        return sum(table.pages_for(slot, parts) for table, parts in self._divided(adapter))

    def _too_large(self, pages: int) -> str:
        needed, budget, fixed = (
            count * self._pool.page_bytes for count in (pages, self._pool.num_pages, self._pool.num_withdrawn)
        )
        less = f" less {fixed:,} that expert places take, used or not" if fixed else ""
        return f"it needs {needed:,} bytes; all adapters together may use {budget:,} (raise --adapter-bytes{less})"

    def _finish_transfer(self, adapter: _Adapter, transfer: Transfer) -> None:
        adapter.transfer = None
        self._enter(adapter, State.RESIDENT)
        if adapter.forgotten:
            self._evict(adapter)
            del self._adapters[adapter.ref]
            return
        if transfer.error is not None:
            self._evict(adapter)
            self._fail(adapter, transfer.error)
            return
        transfer.join()
        for table, _ in self._divided(adapter):
            table.install(adapter.slot)

    def _evict(self, adapter: _Adapter) -> None:
        assert adapter.state is State.RESIDENT and adapter.pins == 0
        with self._arenas.deferred() as pages:
            for table, _ in self._divided(adapter):
                table.unmap(adapter.slot)
        self._transfers.start(pages)
        self._give_back(adapter.slot)
        adapter.slot, adapter.pages = 0, 0
        self._enter(adapter, State.ABSENT)

    def _fail(self, adapter: _Adapter, reason: str) -> None:
        adapter.error = reason
        self._enter(adapter, State.FAILED)

    def _enter(self, adapter: _Adapter, state: State) -> None:
        """It is in this state from now on. Entering the one it is in notes whether it is pinned."""
        if state is not adapter.state:
            if adapter.state is not State.ABSENT:
                del self._in[adapter.state][adapter.ref]
            if state is not State.ABSENT:
                self._in[state][adapter.ref] = adapter
            adapter.state = state
        if adapter.pinned and state is State.ABSENT:
            self._wanted[adapter.ref] = adapter
        else:
            self._wanted.pop(adapter.ref, None)
