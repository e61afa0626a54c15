"""Which adapters are on the device: pins, room, loads under way, and what becomes of those that fail."""

from collections.abc import Collection, Iterable, Sequence
from functools import partial, reduce
from itertools import chain
from typing import Any

from adapters_store.parts import AdapterPackage, Part, SourceFile, by_kind
from adapters_store.ref import AdapterRef
from kernels.adapter_rows import ShapeKey
from server.engine.messages import AdapterMoved, Memory
from server.engine.request import Fault, Slot, Tier
from server.engine.residency import AdapterFailed, AdapterOnDevice, Wait
from server.weights.arena import ArenaError, Arenas
from server.weights.host_cache import HostCache
from server.weights.idle import IdleAdapters, ReloadCosts
from server.weights.known import Known, Tiers
from server.weights.loading import Loading
from server.weights.page_pool import PagePool
from server.weights.room import Room
from server.weights.staging import Copier
from server.weights.tables.table import Table
from server.weights.transfer import Fetch, Transfer

MOST_EARLY = 2  # loads under way, beyond which none is begun that nobody has asked for


class DeviceResidency:
    """Implements the engine's Residency protocol, and the model's AdapterTables.

    An adapter's parts are divided among the tables by kind; it is on the device when all of them are. Pages are counted
    here and at once; threads map, read and copy (loading.py), in the order in which it was counted: an eviction's pages
    go before those of the load that it makes room for. The step loop only looks whether that is done, and flips tables.
    """

    def __init__(
        self,
        num_slots: int,
        pool: PagePool,
        tables: Sequence[Table],
        arenas: Arenas,
        loading: Loading,
        copier: Copier,
        cache: HostCache,
    ) -> None:
        self._pool, self._tables = pool, tuple(tables)
        self._arenas, self._loading, self._copier, self._cache = arenas, loading, copier, cache
        self._adapters: dict[AdapterRef, Known] = {}  # all that are known: never gone through in a step
        self._tiers, self._moved = Tiers(), list[AdapterMoved]()
        self._pinned: dict[AdapterRef, Known] = {}
        self._wanted: dict[AdapterRef, Known] = {}  # pinned and not there: tried in every poll
        self._costs = ReloadCosts()
        self._idle = IdleAdapters(pool.page_bytes, self._weight, self._evict)
        pool.share.idle = self._idle
        self._room = Room(num_slots, pool, self._idle, self._evict)

    # -- Residency, for the scheduler -----------------------------------------------------------

    def register(self, ref: AdapterRef, package: AdapterPackage, pinned: bool = False) -> None:
        it = self._adapters.setdefault(ref, Known(ref))
        # the same weights, perhaps in other files; looked at when a load starts
        it.files, it.parts, it.layouts = package.files, by_kind(package.parts), None
        it.forgotten, it.failure = False, ""  # what failed was the old place; nobody need hear of it now
        it.is_stale = it.job is not None  # so is what the job under way reads
        it.fault = ""
        if it.tier is Tier.QUARANTINED and not it.slot:  # else it is let out when its last pin is released
            self._move(it, Tier.ABSENT)
        self._idle.discard(it)
        it.pinned = pinned
        self._note(it)

    def unpin(self, ref: AdapterRef) -> None:
        it = self._adapters[ref]
        it.pinned = False
        self._note(it)

    def forget(self, ref: AdapterRef) -> int:
        it = self._adapters[ref]
        assert it.pins == 0
        self.unpin(ref)
        num_bytes = self._bytes(it)
        if it.tier is Tier.LOADING:
            it.forgotten = True
            return num_bytes
        if it.slot:
            self._leave_device(it)
        self._drop(it)
        return num_bytes

    def refusal(self, refs: Collection[AdapterRef]) -> str | None:
        if len(refs) < 2:
            return None  # one alone says so itself when it is asked for
        if len(refs) > self._room.num_slots:
            slots = f"there are {self._room.num_slots} slots (adapter_slots)"
            return f"the request needs {len(refs)} adapters at once; {slots}"
        refused = self._room.refusal(sum(self._pages_for(self._adapters[ref]) for ref in refs))
        return f"the request's {len(refs)} adapters together: {refused}" if refused else None

    def poll(self, now: float = 0.0) -> None:
        self._idle.now = now
        for it in tuple(self._tiers.of(Tier.LOADING).values()):
            if it.job is not None and it.job.done:
                self._finish(it, it.job)
        for revision in self._cache.take_dropped():
            self._lost_copy(revision)
        for it in tuple(self._wanted.values()):
            if not it.failure:  # else told to the first who asks for it, and not tried again until then
                self._bring(it)

    def acquire(self, ref: AdapterRef) -> Slot | Wait:
        it = self._adapters[ref]
        if it.tier is Tier.QUARANTINED and it.fault:
            raise AdapterFailed(ref, it.fault, Fault.QUARANTINED)
        if it.failure:
            failure, it.failure = it.failure, ""
            raise AdapterFailed(ref, failure)
        if it.tier in (Tier.LOADING, Tier.QUARANTINED):
            return Wait.LOADING
        if it.tier is not Tier.RESIDENT:
            is_started = self._bring(it)
            if it.failure or it.fault:
                return self.acquire(ref)
            return Wait.LOADING if is_started else Wait.NO_ROOM
        self._idle.discard(it)
        it.pins += 1
        return it.slot

    def release(self, ref: AdapterRef) -> None:
        it = self._adapters[ref]
        assert it.pins > 0
        it.pins -= 1
        if it.pins:
            return
        it.unused_since = self._idle.now
        if it.is_idle:
            self._idle.add(it)
        elif it.tier is Tier.QUARANTINED:
            self._leave_device(it)
            if it.fault:
                self._tell(it)
            else:  # it was registered again meanwhile
                self._move(it, Tier.ABSENT)
                self._note(it)

    def is_resident(self, ref: AdapterRef) -> bool:
        return self._adapters[ref].tier is Tier.RESIDENT

    def in_the_way(self, refs: Collection[AdapterRef]) -> Collection[AdapterRef]:
        lacking = self._lacking(refs)
        own = sum(it.pages for it in map(self._adapters.__getitem__, set(refs)) if it in self._idle)
        busy = [it for it in self._tiers.of(Tier.RESIDENT).values() if it.pins and not it.pinned and it.ref not in refs]
        pages = sum(map(self._pages_for, lacking))
        return [it.ref for it in self._room.in_the_way(len(lacking), pages + own, busy)]

    def claim(self, refs: Collection[AdapterRef]) -> None:
        self._room.claim(sum(map(self._pages_for, self._lacking(refs))))

    def _lacking(self, refs: Collection[AdapterRef]) -> list[Known]:
        """Those of them that have no room yet, and are to have it."""
        known = map(self._adapters.__getitem__, set(refs))
        return [it for it in known if not it.slot and not it.fault and not it.failure]

    def prefetch(self, refs: Sequence[AdapterRef]) -> None:
        for ref in refs:
            if len(self._tiers.of(Tier.LOADING)) >= MOST_EARLY:
                return
            it = self._adapters[ref]
            if it.failure or it.tier not in (Tier.ABSENT, Tier.HOST):
                continue
            if self._room.has_spare(self._pages_for(it)):
                self._bring(it)
            elif it.tier is Tier.ABSENT:
                self._fetch(it)

    def quarantine(self, ref: AdapterRef, reason: str) -> None:
        it = self._adapters.get(ref)
        if it is None or it.tier is Tier.QUARANTINED:
            return
        it.fault = reason
        if it.tier is not Tier.LOADING:  # else when its job is over
            self._confine(it)

    def is_loading(self) -> bool:
        return bool(self._tiers.of(Tier.LOADING))

    def take_moved(self) -> list[AdapterMoved]:
        moved, self._moved = self._moved, []
        return moved

    def memory(self) -> Memory:
        budget = self._pool.share.budget
        kv_bytes = budget.used - self._pool.share.used
        return Memory(budget.total, kv_bytes, self._pool.share.used, self._cache.num_bytes)

    def report(self) -> tuple[AdapterOnDevice, ...]:
        there = chain(self._tiers.of(Tier.RESIDENT).values(), self._tiers.of(Tier.LOADING).values())
        return tuple(AdapterOnDevice(it.ref, it.tier, self._bytes(it), it.pins) for it in there)

    def check(self) -> None:
        known = self._adapters
        self._tiers.check(known)
        self._idle.check(known)
        away = (Tier.ABSENT, Tier.HOST)
        assert self._pinned == {ref: it for ref, it in known.items() if it.pinned}
        assert self._wanted == {ref: it for ref, it in self._pinned.items() if it.tier in away}
        assert all((it.job is not None) == (it.tier is Tier.LOADING) for it in known.values())
        holding = [it for it in known.values() if it.slot]
        self._room.check(it.slot for it in holding)
        assert all(it.slot for it in self._tiers.of(Tier.RESIDENT).values())
        assert all(not it.slot and not it.pages for it in known.values() if it.tier in away)
        assert all(it.pins == 0 or it.tier in (Tier.RESIDENT, Tier.QUARANTINED) for it in known.values())
        assert self._pool.num_used == sum(table.num_mapped_pages for table in self._tables)
        self._pool.check()
        self._pool.share.budget.check()
        self._cache.check()
        for table in self._tables:
            table.check()
            assert all(table.has(it.slot) == (table.kind in it.parts) for it in holding)

    # -- for checks, and for the model -----------------------------------------------------------

    def source(self, ref: AdapterRef) -> tuple[tuple[SourceFile, ...], list[Part]]:
        """Of one that is registered: its files, and what they hold of it."""
        it = self._adapters[ref]
        return it.files, list(chain.from_iterable(it.parts.values()))

    def shape_key(self, slot: Slot) -> ShapeKey:
        return reduce(ShapeKey.joined, (table.shape_key(slot) for table in self._tables))

    # -- loads -----------------------------------------------------------

    def _bring(self, it: Known) -> bool:
        """Start to load it, if there is room or room can be made. What can never be placed is confined."""
        problem = self._refusal(it)
        if problem is not None:
            it.fault = problem
            self._confine(it)
            return False
        pinned = [other for other in self._pinned.values() if other.slot and other is not it]
        it.failure = (not it.pinned and self._room.kept(self._pages_for(it), pinned)) or ""
        slot = None if it.failure else self._room.make(self._pages_for(it))
        if slot is None:
            return False
        used = self._pool.num_used
        try:
            with self._arenas.deferred() as pages:
                self._map(slot, it)
        except ArenaError as error:
            self._room.give_back(slot)
            it.failure = str(error)
            return False
        it.slot, it.pages = slot, self._pool.num_used - used
        cached = self._cache.reserve(it.ref.revision, it.files)
        it.comes_from_host = cached is not None and cached.is_whole
        prepare = [partial(table.prepare, slot) for table, _ in self._laid_out(it)]
        it.job = Transfer(it.files, prepare, pages, self._copier.begin(), cached)
        self._move(it, Tier.LOADING)
        self._note(it)
        self._loading.start(it.job)
        return True

    def _fetch(self, it: Known) -> None:
        """To the host cache, if there is room."""
        cached = self._cache.reserve(it.ref.revision, it.files)
        if cached is not None:
            it.job = Fetch(cached)
            self._move(it, Tier.LOADING)
            self._note(it)
            self._loading.start(it.job)

    def _map(self, slot: Slot, it: Known) -> None:
        """Room in every table that has parts of it; or ArenaError, and in none."""
        mapped: list[Table] = []
        try:
            for table, layout in self._laid_out(it):
                table.map(slot, layout)
                mapped.append(table)
        except ArenaError:
            for table in mapped:
                table.unmap(slot)
            raise

    def _finish(self, it: Known, job: Transfer | Fetch) -> None:
        it.job = None
        failure, has_failed = None if it.is_stale else job.failure, job.failure is not None
        it.is_stale = False
        if isinstance(job, Transfer) and (has_failed or it.fault or it.forgotten):
            self._leave_device(it)
        if it.forgotten:
            self._drop(it)
        elif it.fault or (failure and failure.is_final):
            it.fault = it.fault or (failure.reason if failure else "")
            self._confine(it)
        elif has_failed:  # where it was registered again meanwhile, nobody need hear of it
            it.failure = failure.reason if failure else ""
            self._move(it, self._tier_of_rest(it), reason=it.failure or None)
        elif isinstance(job, Fetch):
            self._move(it, self._tier_of_rest(it), load_s=job.seconds)
        else:
            job.join()
            for table, _ in self._laid_out(it):
                table.install(it.slot)
            self._costs.learn(it, self._bytes(it), job.seconds, it.comes_from_host)
            it.unused_since = self._idle.now
            self._move(it, Tier.RESIDENT, load_s=job.seconds)
        if it.ref in self._adapters:
            self._note(it)

    def _confine(self, it: Known) -> None:
        """To quarantine: on the device it stays until its last pin is released."""
        self._idle.discard(it)
        self._cache.discard(it.ref.revision)
        if it.slot and not it.pins:
            self._leave_device(it)
        self._move(it, Tier.QUARANTINED, reason=it.fault)
        self._note(it)

    def _evict(self, it: Known) -> None:
        assert it.is_idle
        self._leave_device(it)
        self._move(it, self._tier_of_rest(it), was_evicted=True)

    def _leave_device(self, it: Known) -> None:
        """Its room is others' from now on, by the count; its pages go when the device no longer reads them."""
        self._idle.discard(it)
        with self._arenas.deferred() as pages:
            for table, _ in self._laid_out(it):
                table.unmap(it.slot)
        self._loading.do(pages)
        self._room.give_back(it.slot)
        it.slot, it.pages = 0, 0

    def _drop(self, it: Known) -> None:
        self._cache.discard(it.ref.revision)
        if it.tier is not Tier.ABSENT:
            self._move(it, Tier.ABSENT)
        self._wanted.pop(it.ref, None)
        self._pinned.pop(it.ref, None)
        del self._adapters[it.ref]

    def _lost_copy(self, revision: str) -> None:
        """Its copy in the host cache gave way."""
        it = self._adapters.get(AdapterRef("", revision, "lora"))
        if it is not None and it.tier is Tier.HOST:
            self._move(it, Tier.ABSENT)
        elif it is not None and it.tier is Tier.RESIDENT:
            self._tell(it)

    # -- what is kept of each -----------------------------------------------------------

    def _move(self, it: Known, to: Tier, **told: Any) -> None:
        self._tiers.move(it, to)
        self._tell(it, **told)

    def _tell(self, it: Known, **told: Any) -> None:
        """The front, with the next step's events. told: fields of AdapterMoved."""
        host_bytes = self._cache.bytes_of(it.ref.revision)
        self._moved.append(AdapterMoved(it.ref, it.tier, self._bytes(it), host_bytes, **told))

    def _note(self, it: Known) -> None:
        """Whether it is pinned, wanted, idle."""
        if it.pinned:
            self._pinned[it.ref] = it
        else:
            self._pinned.pop(it.ref, None)
        if it.pinned and it.tier in (Tier.ABSENT, Tier.HOST):
            self._wanted[it.ref] = it
        else:
            self._wanted.pop(it.ref, None)
        if it.is_idle and it not in self._idle:
            self._idle.add(it)

    def _tier_of_rest(self, it: Known) -> Tier:
        """Where it is when it is not on the device."""
        return Tier.HOST if self._cache.find(it.ref.revision, it.files) is not None else Tier.ABSENT

    def _weight(self, it: Known) -> float:
        from_host = self._cache.bytes_of(it.ref.revision) > 0
        return self._costs.weight(it, self._bytes(it), from_host)

    def _bytes(self, it: Known) -> int:
        return it.pages * self._pool.page_bytes

    def _laid_out(self, it: Known) -> Iterable[tuple[Table, Any]]:
        """The tables that have parts of it, each with its layout."""
        tables = [table for table in self._tables if table.kind in it.parts]
        if it.layouts is None:
            it.layouts = [table.layout(it.parts[table.kind]) for table in tables]
        return zip(tables, it.layouts, strict=True)

    def _pages_for(self, it: Known) -> int:
        return sum(table.pages_for(layout) for table, layout in self._laid_out(it))

    def _refusal(self, it: Known) -> str | None:
        """Why it can never be placed, if so."""
        homeless = set(it.parts) - {table.kind for table in self._tables}
        if homeless:
            return f"this engine has no table for {', '.join(sorted(kind.__name__ for kind in homeless))}"
        refused = next(filter(None, (layout.refusal for _, layout in self._laid_out(it))), None)
        return refused or self._room.refusal(self._pages_for(it))
