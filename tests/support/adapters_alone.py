"""The lifecycle of adapters without an engine: the real catalogue, store and verification."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from adapters_store.catalog import Catalog
from adapters_store.ref import AdapterRef
from adapters_store.rules import Rules
from adapters_store.store.store import open_store
from adapters_store.verify import Job, Refused, Verified, answer, refusal
from server.engine.messages import AdapterChecked
from server.lifecycle.inspection import Inspection
from server.lifecycle.leases import Leases
from server.lifecycle.lifecycle import Lifecycle
from server.lifecycle.registry import Registry
from server.lifecycle.terms import Terms
from server.lifecycle.wish import Wish, source_path
from tests.support.adapter_files import BASE

TERMS = Terms(("base",), False, 1e-3, 1 << 30, 4, None)


class Engine:
    """What the lifecycle asks of an engine, noted; and what it answers."""

    def __init__(self) -> None:
        self.told: list[AdapterRef] = []
        self.removed: list[AdapterRef] = []
        self.given_up: set[AdapterRef] = set()
        self.checked = AdapterChecked(0, 1e-6, 5.0)

    def add_adapter(self, ref: AdapterRef) -> None:
        self.told.append(ref)
        self.given_up.discard(ref)

    def is_given_up(self, ref: AdapterRef) -> bool:
        return ref in self.given_up

    async def remove_adapter(self, ref: AdapterRef) -> int:
        self.removed.append(ref)
        return 100

    async def check_adapter(self, ref: AdapterRef, num_tokens: int) -> AdapterChecked:
        return self.checked


class InProcess:
    """Verifies at once and here: starting a process costs more than all the rest."""

    async def verify(self, job: Job) -> Verified:
        await asyncio.sleep(0)
        found = answer(job)
        if isinstance(found, Refused):
            raise refusal(found)
        return found

    async def close(self) -> None:
        pass


class Adapters(Lifecycle):
    """With the directories that adapters lie in below `root`, and the store in `root/store`."""

    def __init__(self, root: Path, terms: Terms = TERMS, verifier: Any = None, **catalog: int) -> None:
        self.engine, self.deleted = Engine(), list[str]()
        registry = Registry(Catalog("base", **catalog), open_store(root / "store"), True)
        engine: Any = self.engine
        self.rules = Rules(BASE, (root,))
        inspection = Inspection(registry, self.rules, verifier or InProcess(), engine, terms, self._id, lambda _: None)
        super().__init__(inspection, engine, Leases(), on_delete=self.deleted.append)
        registry.load()

    async def _id(self) -> str:
        return "sha256:" + "0" * 64

    def wish(self, name: str, path: str, **settings: Any) -> Wish:
        return Wish(name, source_path(self.rules, path), **settings)

    def means(self, model: str) -> str:
        return self.catalog.find(model).version.root


@asynccontextmanager
async def adapters(root: Path, **settings: Any) -> AsyncIterator[Adapters]:
    """Open it once at a time: a store has one owner."""
    it = Adapters(root, **settings)
    try:
        yield it
    finally:
        await it.stop()
        await it.registry.close()


async def register(it: Adapters, name: str, path: str, **settings: Any) -> None:
    await it.register(it.wish(name, path, **settings), "me")


async def replace(it: Adapters, name: str, path: str, **settings: Any) -> None:
    await it.replace(it.wish(name, path, **settings), "me")
