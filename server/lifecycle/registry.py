"""The catalogue as a server has it: read from memory at once, changed on disk first, one change after another."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple, ParamSpec, TypeVar

import msgspec

from adapters_store.catalog import Catalog, Change
from adapters_store.errors import BaseUnreadable, WrongBase
from adapters_store.records import Content, Weights
from adapters_store.ref import AdapterRef
from adapters_store.store.blobs import Desk
from adapters_store.store.store import Store
from server.engine.messages import PackedAddAdapter

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Changed(NamedTuple):
    """`change` None: all was so already. `gone` are revisions that no name means any more: what is kept of them may go
    when nobody uses them."""

    change: Change | None
    gone: list[str]


def _hear(changing: "asyncio.Future[Changed]") -> None:
    """A refusal that nobody waits for any more is no news for the log."""
    if not changing.cancelled():
        changing.exception()


class Registry:
    """A change is planned when its turn has come, on the state as it is then; written by a thread of its own, since a
    disk takes its time; and applied when it is on the disk. Whoever asks in between still sees what was."""

    def __init__(self, catalog: Catalog, store: Store, is_durable: bool) -> None:
        """`is_durable`: whether the store outlives the server."""
        self.catalog, self.store, self.is_durable = catalog, store, is_durable
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "store")
        self._num_desks = 0
        # once no desk is open these may go, where nothing speaks of them
        self._unspoken: list[str] = []  # revisions
        self._brought: list[str] = []  # blobs, by hash: of adapters that were refused, say
        self._candidates: dict[str, Content] = {}  # being looked at, and in no store yet

    def load(self) -> None:
        """From disk. What its blobs do not bear out is in quarantine until they do. Raises StoreFailed."""
        records, weights, aliases = self.store.load()
        lost = self._look_at_blobs()
        known = {it.revision: self._checked(it, lost) for it in weights}
        for record in records:
            self.catalog.restore(record, [known[version.revision] for version in record.versions])
        for alias in aliases:
            self.catalog.apply(Change("alias", alias.name, alias=alias))

    def _look_at_blobs(self) -> set[str]:
        """Those that are lost. Others, which no weights have, were brought by a server that was killed: they go."""
        wanted, present = self.store.journal.blobs(), {it.sha256: it for it in self.store.blobs.present()}
        self.store.blobs.remove(it for it in present.values() if it.sha256 not in wanted)
        return {it for it, size in wanted.items() if it not in present or present[it].size != size}

    def _checked(self, weights: Weights, lost: set[str]) -> Weights:
        if not lost or weights.fault is not None:
            return weights
        missing = next((it for it in self.store.journal.files(weights.revision) if it.sha256 in lost), None)
        fault = self.store.blobs.fault(missing) if missing is not None else None
        if fault is None:
            return weights
        return msgspec.structs.replace(weights, fault=f"{fault}: register it again", is_lost=True)

    # -- changes -----------------------------------------------------------

    async def change(
        self, plan: Callable[[], Change | None], actor: str, new: tuple[Weights, Content] | None = None
    ) -> Changed:
        """Raises what `plan` raises, StoreFull or StoreFailed; then nothing has changed. A caller that leaves does not
        stop what has begun."""
        work = self._change(plan, actor, None) if new is None else self._with_blobs(plan, actor, new)
        changing = asyncio.ensure_future(work)
        changing.add_done_callback(_hear)
        return await asyncio.shield(changing)

    async def _with_blobs(self, plan: Callable[[], Change | None], actor: str, new: tuple[Weights, Content]) -> Changed:
        """The caller's desk is closed if it leaves, and until this is written nothing speaks of the blobs."""
        self._num_desks += 1
        try:
            return await self._change(plan, actor, new)
        finally:
            await self._leave_desk()

    async def _change(
        self, plan: Callable[[], Change | None], actor: str, new: tuple[Weights, Content] | None
    ) -> Changed:
        async with self._turn:
            change = plan()
            if change is None:
                return Changed(None, [])
            await self._off_the_loop(self.store.commit, change, actor, new)
            return Changed(change, self.catalog.apply(change))

    async def forget(self, revisions: Sequence[str]) -> int:
        """Drop what is kept of weights that no name means, unless one does by now. Returns the bytes freed on disk;
        what may be part of an adapter that is being verified goes later."""
        return await asyncio.shield(self._forget(revisions))

    async def _forget(self, revisions: Sequence[str]) -> int:
        async with self._turn:
            self._unspoken += revisions
            if self._num_desks:
                return 0
            unused, brought = [it for it in self._unspoken if not self.catalog.is_used(it)], self._brought
            self._unspoken, self._brought = [], []
            return await self._off_the_loop(self.store.forget, unused, brought)

    async def sweep(self) -> int:
        """Remove blobs that no weights have. Returns the bytes freed; none while an adapter is being verified."""
        async with self._turn:
            return 0 if self._num_desks else await self._off_the_loop(self.store.sweep)

    @asynccontextmanager
    async def desk(self) -> AsyncIterator[Desk]:
        """Where an adapter's files are copied to while it is verified. Until it is closed no blob is removed: what the
        adapter shares with another may be one."""
        async with self._turn:
            self._num_desks += 1
        try:
            with self.store.blobs.desk() as desk:
                try:
                    yield desk
                finally:
                    self._brought += desk.made()
        finally:
            await self._leave_desk()

    async def _leave_desk(self) -> None:
        self._num_desks -= 1
        if not self._num_desks and (self._unspoken or self._brought):
            await self.forget([])

    # -- what is kept -----------------------------------------------------------

    @contextmanager
    def candidate(self, weights: Weights, content: Content) -> Iterator[None]:
        """The engine may be told of these weights although no name means them yet."""
        self._candidates[weights.revision] = content
        try:
            yield
        finally:
            self._candidates.pop(weights.revision, None)

    def packed(self, ref: AdapterRef) -> PackedAddAdapter:
        """What the engine must know of an adapter. Raises StoreFailed."""
        candidate = self._candidates.get(ref.revision)
        package = candidate.package if candidate is not None else self.store.package(ref.revision)
        root = str(self.store.blobs.root.resolve())
        return PackedAddAdapter(ref, msgspec.Raw(package), root, self.is_pinned(ref.revision))

    def is_pinned(self, revision: str) -> bool:
        return any(record.current.manifest.pinned for record in self.catalog.meaning(revision))

    async def content(self, revision: str) -> Content:
        return await self._off_the_loop(self.store.content, revision)

    async def fault(self, revision: str) -> str | None:
        """What is wrong with the first blob that is not as it was stored, every byte of which is read. Raises
        StoreFailed."""
        for file in (await self.content(revision)).files:
            fault = await asyncio.to_thread(self.store.blobs.fault, file, True)
            if fault is not None:
                return fault
        return None

    async def base_id(self, read: Callable[[], str]) -> str:
        """The identity of the base's weights, which are read once for the life of a store. Raises WrongBase."""
        known = self.store.journal.identity("base_id")
        if known is not None:
            return known.decode()
        try:
            found = await asyncio.to_thread(read)
        except BaseUnreadable as error:
            raise WrongBase(f"its manifest names a base, and {error}") from None
        async with self._turn:
            await self._off_the_loop(self.store.identify, {"base_id": found.encode()})
        return found

    async def close(self) -> None:
        """When no change is under way any more."""
        async with self._turn:
            await self._off_the_loop(self.store.close)
        self._thread.shutdown()

    async def _off_the_loop(
        self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))
