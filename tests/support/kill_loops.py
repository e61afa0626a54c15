"""Kill, open again, compare: what was acknowledged is there, what was under way is there whole or not at all."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import msgspec
import psutil

from adapters_store.base_spec import BaseSpec
from adapters_store.catalog import Catalog
from adapters_store.parts import AdapterPackage
from adapters_store.rules import Rules
from adapters_store.store.store import Store, open_store
from server.lifecycle.registry import Registry
from tests.support.linearizability import Kind, Operation, State, applied, states_after
from tests.support.live_server import ROOT, LiveServer
from tests.support.recorded_clients import at_once, random_client

States = dict[str, State]
Counts = Counter[str]
CLIENTS = ("alpha", "beta", "gamma")  # names, each changed by one client
CHANGES: tuple[Kind, ...] = ("register", "replace", "replace", "rollback", "delete")


def inspect(directory: Path) -> tuple[States, int]:
    """What the names in a store mean, and how many changes its log tells. Raises AssertionError where anything is lost,
    half there, or there and spoken of by nobody."""
    store = open_store(directory)
    try:
        assert store.journal._reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        registry = Registry(Catalog("base"), store, True)
        registry.load()
        registry.catalog.check()
        assert not list((directory / "incoming").iterdir()) and not store.journal.unused()
        assert all(registry.catalog.find(record.name).weights.fault is None for record in registry.catalog)
        states: States = {}
        for record in registry.catalog:
            states[record.name] = tuple(version.revision for version in record.versions)
            for revision in states[record.name]:
                _check_whole(store, registry, revision)
        store.sweep()
        assert {it.sha256: it.size for it in store.blobs.present()} == store.journal.blobs()
        return states, len(store.log(limit=1_000_000))
    finally:
        store.close()


def _check_whole(store: Store, registry: Registry, revision: str) -> None:
    content, weights = store.content(revision), registry.catalog.weights(revision)
    package = msgspec.msgpack.decode(content.package, type=AdapterPackage)
    assert weights is not None and weights.revision == package.revision == revision
    assert {it.sha256 for it in package.files} <= {it.sha256 for it in content.files}
    assert json.loads(content.description)
    for file in content.files:
        raw = (store.blobs.root / file.path).read_bytes()
        assert len(raw) == file.size and hashlib.sha256(raw).hexdigest() == file.sha256


def compare(before: States, after: States, asked: Mapping[str, Sequence[Operation]], counts: Counts) -> None:
    """`asked` by name, each by one client one after another. Raises AssertionError for a lost write, or one that nobody
    asked for."""
    assert set(after) <= set(before) | set(asked), "a name that nobody registered"
    for name in set(before) | set(asked):
        operations = asked.get(name, ())
        possible = states_after(before.get(name, ()), operations)
        found = after.get(name, ())
        if found not in possible:
            counts["lost"] += 1
        assert found in possible, f"{name} means {found}; after {operations} it can mean {possible}"
        state = before.get(name, ())
        for it in operations:
            _, then = applied(state, it)
            if then == state:
                continue  # refused, or it was so already
            if it.status is not None:
                counts["acknowledged"] += 1
                state = then
            else:
                counts["in flight"] += 1
                counts["survived" if found == then else "vanished"] += 1


class DriverLoops:
    """Loops over one store and one driver (tests/support/catalogue_driver.py); a context manager.

    `revisions` by the names of the directories in `adapters`.
    """

    def __init__(self, store: Path, base: BaseSpec, adapters: Path, revisions: Mapping[str, str], seed: int) -> None:
        self._store, self._adapters, self._revisions = store, adapters, revisions
        self._rng = random.Random(seed)
        self._base = store.with_name(f"{store.name}-base.json")
        self._base.write_bytes(msgspec.json.encode(base))
        self.counts: Counts = Counter()
        self._states: States = {}

    def __enter__(self) -> Self:
        self._driver = subprocess.Popen(
            [sys.executable, "-m", "tests.support.catalogue_driver", str(self._base), str(self._adapters)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._driver.stdin, self._driver.stdout):
            assert stream is not None
            stream.close()
        self._driver.wait(10)

    def loop(self, longest_s: float = 0.15) -> None:
        """Start, kill at a random instant, and compare. One in ten dies while it opens the store."""
        assert self._driver.stdin is not None and self._driver.stdout is not None
        wait = "ready" if self._rng.random() < 0.1 else "loaded"
        print(json.dumps([str(self._store), self._rng.getrandbits(32)]), file=self._driver.stdin, flush=True)
        lines: list[dict[str, Any]] = []
        pid = 0
        while not any(wait in line for line in lines):
            lines.append(json.loads(self._driver.stdout.readline()))
            pid = lines[-1].get("ready", pid)
            assert "ended" not in lines[-1], "the driver's child ended by itself"
        time.sleep(self._rng.uniform(0, longest_s if wait == "loaded" else 0.01))
        os.kill(pid, signal.SIGKILL)
        while "ended" not in lines[-1]:
            lines.append(json.loads(self._driver.stdout.readline()))
        assert lines[-1]["ended"] == -signal.SIGKILL
        after, num_logged = inspect(self._store)
        asked = self._asked(lines)
        compare(self._states, after, asked, self.counts)
        assert num_logged == self.counts["acknowledged"] + self.counts["survived"], "the log tells of other changes"
        self._states = after
        self.counts["loops"] += 1

    def _asked(self, lines: Sequence[dict[str, Any]]) -> dict[str, list[Operation]]:
        asked: dict[str, list[Operation]] = {}
        for line in lines:
            if "begin" in line:
                revision = self._revisions[line["path"]] if line["path"] else None
                asked.setdefault(line["begin"], []).append(Operation(line["begin"], line["kind"], revision))
            elif "done" in line:
                mine = asked[line["done"]]
                mine[-1] = Operation(mine[-1].name, mine[-1].kind, mine[-1].revision, status=line["status"])
        return asked


class ServerLoops:
    """The same with whole servers over one store: `start` makes one, and clients speak HTTP to it. `paths` are the
    adapters' by revision."""

    def __init__(self, store: Path, start: Callable[[], LiveServer], paths: Mapping[str, str], seed: int) -> None:
        self._store, self._start, self._paths = store, start, paths
        self._rng = random.Random(seed)
        self.counts: Counts = Counter()
        self._states: States = {}

    def loop(self, num_writers: int = 0, longest_s: float = 1.5) -> None:
        """`num_writers` register different weights by one new name first: one of them wins, and has won after it."""
        server = self._start().wait_ready()
        verifiers: list[psutil.Process] = []
        asked: dict[str, list[Operation]] = {}
        try:
            if num_writers:
                name = f"won-{self.counts['loops']}"
                wishes = [Operation(name, "register", it) for it in list(self._paths)[:num_writers]]
                answered = at_once(server.url, wishes, self._paths)
                winners = [it for it in answered if it.status == 201]
                assert len(winners) == 1 and {it.status for it in answered} == {201, 409}, answered
                asked[name] = winners
            with ThreadPoolExecutor(len(CLIENTS)) as pool:
                seeds = {name: self._rng.getrandbits(32) for name in CLIENTS}
                running = {
                    name: pool.submit(list, random_client(server.url, seed, [name], self._paths, CHANGES))
                    for name, seed in seeds.items()
                }
                time.sleep(self._rng.uniform(0.02, longest_s))
                verifiers = [it for it in psutil.Process(server.process.pid).children() if _is_verifier(it)]
                server.kill()
                asked |= {name: it.result() for name, it in running.items()}
        finally:
            server.kill()
        _, alive = psutil.wait_procs(verifiers, 20)  # they end with what they are at, or before
        assert not alive
        after, _ = inspect(self._store)
        compare(self._states, after, asked, self.counts)
        self._states = after
        self.counts["loops"] += 1


def _is_verifier(process: psutil.Process) -> bool:
    try:
        return "adapters_store.verify" in process.cmdline()
    except psutil.Error:
        return False


def revisions_of(adapters: Path, base: BaseSpec) -> dict[str, str]:
    """By the names of the directories."""
    rules = Rules(base, (adapters,))
    return {path.name: rules.read(path.name, str(path)).ref.revision for path in sorted(adapters.iterdir())}
