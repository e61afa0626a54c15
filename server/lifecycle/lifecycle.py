"""What happens to adapters while others decode: registered, replaced, rolled back, aliased, checked, deleted.

HTTP routes, commands, the start and the clock call this; nothing here knows HTTP. Names are the catalogue's
(registry.py), and what is on the device is the engine's. Between the two stands the order of things: new weights are on
the disk before a name means them, and old ones leave engine and disk when the last request that began with them has
ended.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec

from adapters_store.catalog import Catalog, Change, Found
from adapters_store.errors import AdapterError, AdapterQuarantined, GivenUp, RevisionChanged
from adapters_store.records import Content, Target, Weights
from adapters_store.ref import AdapterRef
from adapters_store.verify import Verified
from server.engine.messages import AdapterMoved
from server.engine.request import Tier
from server.errors import AdapterDeleted, HeddleError
from server.lifecycle.engine import Engine
from server.lifecycle.inspection import Inspection
from server.lifecycle.leases import Leases
from server.lifecycle.wish import Wish

log = logging.getLogger("heddle.adapters")
AT_ONCE = 1000  # names that are looked at before others have their turn
SUSPECT_AGAIN_S = 60.0  # after which the files of an adapter whose requests fail are read again

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settled:
    """What has become of a wish. `is_new`: the name did not exist; `is_changed`: it means something else than
    before."""

    found: Found
    is_new: bool
    is_changed: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Freed:
    device_bytes: int
    disk_bytes: int


class _Done(NamedTuple):
    """A change of a name that shall mean something. `found`: what it means right after."""

    change: Change | None
    found: Found
    is_new: bool


class Lifecycle:
    def __init__(
        self,
        inspection: Inspection,
        engine: Engine,
        leases: Leases,
        on_delete: Callable[[str], None],
    ) -> None:
        """`on_delete` is told of names that are gone."""
        self.inspection, self.registry, self.leases = inspection, inspection.registry, leases
        self._engine, self._on_delete = engine, on_delete
        self._tasks: set[asyncio.Task[Any]] = set()  # that nobody waits for
        self._suspected: dict[str, float] = {}  # revision -> when its files were last read for a request that failed

    @property
    def catalog(self) -> Catalog:
        return self.registry.catalog

    # -- names come to mean weights -----------------------------------------------------------

    async def register(self, wish: Wish, actor: str) -> Settled:
        """A free name. If it means these very weights already, nothing happens. Raises AdapterError and HeddleError."""
        self.catalog.check_name(wish.name)
        async with self.inspection.verified(wish) as (verified, version):
            weights = verified.weights
            done = await self._change(
                wish.name,
                lambda: self.catalog.registered(wish.name, weights, version, wish.is_durable),
                actor,
                (weights, verified.content),
            )
        return self._settled(done, verified)

    async def replace(self, wish: Wish, actor: str, expected: str | None = None) -> Settled:
        """Whatever the name means, or a free one. Requests under way finish on what they began with, later ones use the
        new. `expected`: the revision that it must mean now, else RevisionChanged."""
        self.catalog.check_name(wish.name)
        self._expect(wish.name, expected)
        async with self.inspection.verified(wish) as (verified, version):

            def plan() -> Change | None:
                self._expect(wish.name, expected)
                change = self.catalog.replaced(wish.name, verified.weights, version)
                weights = change.weights if change is not None else None
                if weights is not None and weights.fault is not None and wish.name in self.catalog:
                    raise AdapterQuarantined(f"{weights.fault}; {wish.name!r} means what it did before")
                return change

            done = await self._change(wish.name, plan, actor, (verified.weights, verified.content))
        return self._settled(done, verified)

    async def roll_back(self, name: str, revision: str | None, actor: str) -> Found:
        """To the revision before, or to the one that begins so."""
        done = await self._change(name, lambda: self.catalog.rolled_back(name, revision, int(time.time())), actor)
        return done.found

    async def delete(self, name: str, actor: str, drain_s: float | None = None) -> Freed:
        """New requests no longer find it; those under way finish, within `drain_s` seconds if that is given, else they
        are ended. Returns what is free when they have."""

        async def deleted() -> Freed:
            gone = await self._remove(name, actor)
            return await self._leave(name, gone, math.inf if drain_s is None else drain_s)

        return await self._to_its_end(deleted())

    async def _remove(self, name: str, actor: str) -> list[str]:
        """Returns the revisions that no name means any more."""
        changed = await self.registry.change(lambda: self.catalog.removed(name), actor)
        self._on_delete(name)
        return changed.gone

    # -- aliases -----------------------------------------------------------

    async def alias(self, name: str, targets: tuple[Target, ...], actor: str) -> None:
        await self.registry.change(lambda: self.catalog.aliased(name, targets, int(time.time())), actor)

    async def unalias(self, name: str, actor: str) -> None:
        await self.registry.change(lambda: self.catalog.unaliased(name), actor)

    # -- looking after what is there -----------------------------------------------------------

    async def check(self, name: str, actor: str) -> Found:
        """Read every byte that is kept of an adapter, and compare its logits with those of merged weights. What is
        found wanting is in quarantine from then on, what is found sound no longer."""
        found = self.catalog.find(name)
        read = await self.inspection.read_again(found)
        if isinstance(read, Verified):
            parity, fault = await self.inspection.compared(found.ref)
            weights = msgspec.structs.replace(read.weights, fault=fault, parity=parity or found.weights.parity)
            if fault is not None and not weights.differs:  # nothing was compared: what mended it before still does
                weights = msgspec.structs.replace(weights, is_lost=found.weights.is_lost)
        else:
            weights = msgspec.structs.replace(found.weights, fault=read, is_lost=True)
        await self.registry.change(lambda: self.catalog.marked(name, weights), actor)
        return found._replace(weights=weights)

    async def read_again(self) -> None:
        """Whatever another Heddle read into the store: this one may understand or refuse more. At start."""
        for record in list(self.catalog):
            for version in record.versions:
                found = self.catalog.find(f"{record.name}@{version.revision}")
                try:
                    read = await self.inspection.read_again(found)
                except GivenUp as error:
                    read = str(error)
                if isinstance(read, str):
                    weights = msgspec.structs.replace(found.weights, fault=read, is_lost=True)
                    log.warning("adapter %s: in quarantine: %s", record.name, read)
                    new = None
                else:
                    fault = None if found.weights.is_lost else found.weights.fault
                    weights = msgspec.structs.replace(read.weights, fault=fault, parity=found.weights.parity)
                    new = (weights, read.content)
                await self.registry.change(partial(self.catalog.marked, record.name, weights), "another version", new)

    def suspect(self, ref: AdapterRef) -> None:
        """A request through these weights has failed: are their files still as they were stored? Nobody waits."""
        now = time.monotonic()
        if now - self._suspected.get(ref.revision, -SUSPECT_AGAIN_S) < SUSPECT_AGAIN_S:
            return
        self._suspected = {key: at for key, at in self._suspected.items() if now - at < SUSPECT_AGAIN_S}
        self._suspected[ref.revision] = now
        self._in_background(self._look_at(ref))

    def moved(self, moved: AdapterMoved) -> None:
        """The engine says where an adapter is now. What it has put into quarantine is there for everybody, under every
        name, and after a restart, until it is registered again.

        It gives the reason once. What it says later of one that stays there may have been said before it heard that
        the adapter is registered again.
        """
        if moved.tier is Tier.QUARANTINED and moved.reason:
            self._in_background(self._mark(moved.ref, moved.reason, "the engine", self._engine.is_given_up))

    async def _look_at(self, ref: AdapterRef) -> None:
        try:
            fault = await self.registry.fault(ref.revision)
        except AdapterError as error:
            log.error("the files of an adapter could not be looked at: %s", error)
        else:
            if fault is not None:
                await self._mark(ref, fault, "a failed request", lambda _: True)

    async def _mark(self, ref: AdapterRef, fault: str, actor: str, is_so: Callable[[AdapterRef], bool]) -> None:
        """`is_so`: whether it is still so when its turn has come."""

        def plan() -> Change | None:
            names, weights = self.catalog.holding(ref.revision), self.catalog.weights(ref.revision)
            if not names or weights is None or not is_so(ref):
                return None
            if weights.fault is not None and (weights.is_lost or weights.differs):
                return None  # it is there already, for what would outlast this
            told = fault if fault.endswith("again") else f"{fault}: register it again"  # the engine may say so itself
            lost = msgspec.structs.replace(weights, fault=told, is_lost=True)
            log.error("adapter %s: in quarantine: %s", names[0].name, lost.fault)
            return self.catalog.marked(names[0].name, lost)

        try:
            await self.registry.change(plan, actor)
        except AdapterError as error:
            log.error("an adapter could not be put into quarantine: %s", error)

    async def collect(self, actor: str) -> tuple[int, int]:
        """Of what names meant before, keep the last few; remove what nothing speaks of. Returns how many revisions no
        longer resolve, and the bytes freed on disk."""
        num_gone, freed = 0, 0
        for index, record in enumerate(list(self.catalog)):
            if index % AT_ONCE == 0:
                await asyncio.sleep(0)
            trimmed = self.catalog.trimmed(record)
            if trimmed is None or record.name not in self.catalog:
                continue
            changed = await self.registry.change(partial(self._trimmed, record.name), actor)
            num_gone += len(changed.gone)
            leaving = self._let_go(changed.gone)
            if leaving is not None and not any(map(self.leases.is_used, changed.gone)):
                freed += (await leaving).disk_bytes
        return num_gone, freed + await self.registry.sweep()

    def _trimmed(self, name: str) -> Change | None:
        return self.catalog.trimmed(self.catalog.get(name)) if name in self.catalog else None

    async def expire(self, every_s: float = 1.0) -> None:
        """Delete adapters whose time has come, for ever. Run as one task."""
        told: set[str] = set()  # which cannot be deleted, and that has been said
        while True:
            await asyncio.sleep(every_s)
            expired = self.catalog.expired(time.time())
            told.intersection_update(expired)
            for name in expired:
                try:
                    gone = await self._remove(name, "expiry")
                except (AdapterError, HeddleError) as error:
                    if name not in told:
                        log.warning("adapter %s: it has expired and cannot be deleted: %s", name, error)
                    told.add(name)
                else:
                    log.info("adapter %s: deleted, its time has come", name)
                    self._let_go(gone)  # the next need not wait for its requests

    def tell_pinned(self) -> None:
        """Bring what is pinned to the device. At start."""
        for record in self.catalog:
            if record.current.manifest.pinned and self.catalog.find(record.name).weights.fault is None:
                self._tell_pinned(record.name)

    async def stop(self) -> None:
        """What has not left by now is swept at the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _expect(self, name: str, expected: str | None) -> None:
        if expected is None:
            return
        current = self.catalog.get(name).current.revision if name in self.catalog else "nothing"
        if not current.startswith(expected):
            raise RevisionChanged(f"{name!r} means {current}, not {expected[:64]!r}; look at it again")

    # -- after it -----------------------------------------------------------

    async def _change(
        self,
        name: str,
        plan: Callable[[], Change | None],
        actor: str,
        new: tuple[Weights, Content] | None = None,
    ) -> "_Done":
        """What the change made of the name, not what the name means when the caller goes on: others may have changed it
        again by then."""
        told: list[tuple[Found, bool]] = []

        def planned() -> Change | None:
            change = plan()
            found = self.catalog.found_after(name, change)
            if change is not None and found.version.manifest.pinned:
                self.inspection.check_pins(name, found.weights)  # again: others may have been pinned since
            told.append((found, name not in self.catalog))
            return change

        async def changed() -> Change | None:
            change, gone = await self.registry.change(planned, actor, new)
            self._let_go(gone)
            found, _ = told[0]
            is_sound = new is not None and found.weights.fault is None and self.catalog.is_used(found.ref.revision)
            if is_sound and self._engine.is_given_up(found.ref):
                self._engine.add_adapter(found.ref)  # it was verified again, which lifts that
            elif change is not None:
                self._tell_pinned(name)
            return change

        change = await self._to_its_end(changed())
        found, is_new = told[0]
        return _Done(change, found, is_new)

    def _settled(self, done: "_Done", verified: Verified) -> Settled:
        found, change, is_new = done.found, done.change, done.is_new
        name = found.record.name
        if change is not None:
            declared = found.version.declared_base or "a base that it does not name"
            replaced = "" if is_new else f", in place of {(change.details or 'the same')[:12]}"
            log.info("adapter %s: %s, trained on %s%s", name, found.ref.kind, declared, replaced)
            for note in verified.notes:
                log.info("adapter %s: %s", name, note)
            for warning in self.inspection.warnings_for(found):
                log.warning("adapter %s: %s", name, warning)
        if found.weights.fault is not None:
            raise AdapterQuarantined(f"{name!r} is registered and in quarantine: {found.weights.fault}")
        return Settled(found, is_new, change is not None, verified.notes)

    def _tell_pinned(self, name: str) -> None:
        """The engine hears of a pin before it hears of a request, and of one that is no more."""
        if name not in self.catalog:
            return  # deleted again
        found = self.catalog.find(name)
        if self._engine.is_given_up(found.ref):
            return  # telling it would lift that
        if found.version.manifest.pinned or any(it.manifest.pinned for it in found.record.versions):
            self._engine.add_adapter(found.ref)

    def _let_go(self, revisions: Sequence[str]) -> "asyncio.Task[Freed] | None":
        """What no name means any more leaves engine and disk when nobody uses it; nobody waits for that."""
        if not revisions:
            return None
        return self._in_background(self._leave("", list(revisions), math.inf))

    async def _to_its_end(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What follows from a change follows, though the client has left."""
        task = self._in_background(work)
        task.add_done_callback(lambda it: it.cancelled() or it.exception())  # nobody may be left to hear of a refusal
        return await asyncio.shield(task)

    def _in_background(self, work: Coroutine[Any, Any, Result]) -> "asyncio.Task[Result]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _leave(self, name: str, revisions: list[str], within_s: float) -> Freed:
        """Only those are waited for that hold it now: the name may be given again meanwhile, and so may the weights."""
        held = self.leases.held(name, revisions)
        if not await self.leases.until_ended(held, within_s):
            error = AdapterDeleted(f"the adapter {name!r} was deleted, and {within_s:g} s were given to finish")
            for lease in held:
                lease.end_with(error)
            await self.leases.until_ended(held)
        device_bytes = 0
        # what was given again and deleted again meanwhile leaves with those that hold it since
        unused = [it for it in revisions if not self.catalog.is_used(it) and not self.leases.is_used(it)]
        for revision in unused:
            device_bytes += await self._engine.remove_adapter(AdapterRef(name, revision, "lora"))
        return Freed(device_bytes, await self.registry.forget(unused))
