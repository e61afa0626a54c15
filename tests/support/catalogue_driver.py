"""A front's catalogue without HTTP and without an engine, made to be killed.

    python -m tests.support.catalogue_driver BASE.json ADAPTERS

Each line of standard input is a store's directory and a seed. For each a child is forked that opens the store and
registers, replaces, rolls back and deletes adapters at random, as one client for each name would, until somebody kills
it. It says what it is about to do, and what was acknowledged. All of a server's code between the routes and the disk is
the real one, except that verification runs in a thread and not in a process: so a kill comes in mid-copy too.
"""

import asyncio
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import msgspec

from adapters_store.base_spec import BaseSpec
from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterError
from adapters_store.ref import AdapterRef
from adapters_store.rules import Rules
from adapters_store.store.store import open_store
from adapters_store.verify import Job, Refused, Verified, answer, refusal
from server.errors import ADAPTER_STATUS
from server.lifecycle.inspection import Inspection
from server.lifecycle.leases import Leases
from server.lifecycle.lifecycle import Lifecycle
from server.lifecycle.registry import Registry
from server.lifecycle.terms import Terms
from server.lifecycle.wish import Wish, source_path
from tests.support.linearizability import Kind

NAMES = ("alpha", "beta", "gamma")
KINDS: tuple[Kind, ...] = ("register", "replace", "replace", "rollback", "delete")


class _Thread:
    """As a Verifier."""

    async def verify(self, job: Job) -> Verified:
        found = await asyncio.to_thread(answer, job)
        if isinstance(found, Refused):
            raise refusal(found)
        return found


class _NoEngine:
    """As an EngineClient, of an engine that has nothing."""

    def add_adapter(self, ref: AdapterRef) -> None:
        pass

    def is_given_up(self, ref: AdapterRef) -> bool:
        return False

    async def remove_adapter(self, ref: AdapterRef) -> int:
        return 0


async def _base_id() -> str:
    raise AssertionError("no manifest here names a base")


def lifecycle_over(store: Path, base: BaseSpec, adapters: Path) -> Lifecycle:
    registry = Registry(Catalog("base"), open_store(store), True)
    registry.load()
    terms = Terms(("base",), False, 1.0, 1 << 30, 4, None)
    engine: Any = _NoEngine()
    verifier: Any = _Thread()
    rules = Rules(base, (adapters,))
    inspection = Inspection(registry, rules, verifier, engine, terms, _base_id, check_template=lambda template: None)
    return Lifecycle(inspection, engine, Leases(), on_delete=lambda name: None)


class Child:
    def __init__(self, lifecycle: Lifecycle, adapters: Path, seed: int) -> None:
        self._lifecycle, self._rng = lifecycle, random.Random(seed)
        self._paths = sorted(adapters.iterdir())

    async def client(self, name: str) -> None:
        while True:
            kind, path = self._rng.choice(KINDS), self._rng.choice(self._paths)
            sent = path.name if kind in ("register", "replace") else None
            say({"begin": name, "kind": kind, "path": sent})
            status = await self._status(kind, name, path)
            say({"done": name, "status": status})

    async def _status(self, kind: Kind, name: str, path: Path) -> int:
        it = self._lifecycle
        try:
            match kind:
                case "register" | "replace":
                    wish = Wish(name, source_path(it.inspection.rules, str(path)))
                    settled = await (it.register if kind == "register" else it.replace)(wish, "driver")
                    return 201 if settled.is_new else 200
                case "rollback":
                    await it.roll_back(name, None, "driver")
                case _:
                    await it.delete(name, "driver")
            return 200
        except AdapterError as error:
            return ADAPTER_STATUS[type(error)][0]


def say(words: dict[str, object]) -> None:
    """One write, so that a kill leaves a line whole or none."""
    os.write(1, json.dumps(words).encode() + b"\n")


async def run(store: Path, base: BaseSpec, adapters: Path, seed: int) -> None:
    say({"ready": os.getpid()})
    child = Child(lifecycle_over(store, base, adapters), adapters, seed)
    say({"loaded": True})
    await asyncio.gather(*(child.client(name) for name in NAMES))


def main() -> None:
    base = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=BaseSpec)
    for line in sys.stdin:
        store, seed = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(run(Path(store), base, Path(sys.argv[2]), seed))
            finally:
                os._exit(70)  # it was to be killed
        status = os.waitpid(child, 0)[1]
        say({"ended": os.waitstatus_to_exitcode(status)})


if __name__ == "__main__":
    main()
