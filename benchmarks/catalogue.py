"""The catalogue of adapters: what ten thousand cost, and whether it keeps its word.

    python -m benchmarks.catalogue --write          # rewrites results/catalogue.md; a quarter of an hour
    python -m benchmarks.catalogue --only kills writers --loops 50

scale      start, memory, look-ups and lists with --adapters registered and with none
steps      the engine's CPU time a token, the same way
kills      kill -9 at random instants: --loops of a front without HTTP and engine, --server-loops of whole servers
writers    a hundred clients on one name at once, and fewer many times: one wins, and has won after kill -9 too
histories  what many clients saw of few names in --seconds, checked for linearizability

Exit status 1 where a write was lost, more than one won, or a history cannot be explained.
"""

import argparse
import os
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import httpx

from adapters_store.base_spec import BaseSpec
from benchmarks import catalogue_scale
from benchmarks.catalogue_scale import LINEAR, Rows
from tests.support.distinct_adapters import save_distinct, save_small
from tests.support.kill_loops import Counts, DriverLoops, ServerLoops, revisions_of
from tests.support.linearizability import Operation, unexplained
from tests.support.live_server import LiveServer, write_tokenizer
from tests.support.recorded_clients import at_once, record
from tests.support.tiny_models import make_config, save_model

RESULTS = Path(__file__).resolve().parent / "results" / "catalogue.md"
MANY, FEW, TIMES = 100, 8, 50
TAMPERED = 200


class Tiny:
    """A tiny model, `count` adapters of it, and servers over one store."""

    def __init__(self, directory: Path, count: int) -> None:
        self.directory = directory
        width = make_config("llama").hidden_size
        write_tokenizer(save_model(directory / "tiny", "llama", vocab_size=256))
        self.adapters = directory / "adapters"
        save_distinct(self.adapters, save_small(directory / "like", LINEAR, width, width), count)
        self.base = BaseSpec("llama", {LINEAR: (width, width)}, {})
        self.revisions = revisions_of(self.adapters, self.base)
        self.paths = {revision: name for name, revision in self.revisions.items()}

    def start(self) -> LiveServer:
        return LiveServer(str(self.directory / "tiny"), "--adapter-root", str(self.adapters), "--store",
                          str(self.directory / "store"), log=self.directory / "log")  # fmt: skip


def kills(directory: Path, loops: int, server_loops: int) -> Rows:
    tiny, started = Tiny(directory, 8), time.monotonic()
    with DriverLoops(directory / "driven", tiny.base, tiny.adapters, tiny.revisions, seed=1) as driven:
        for number in range(loops):
            driven.loop()
            if number % 50 == 49:
                print(f"kill loops: {dict(driven.counts)}", flush=True)
    seconds = time.monotonic() - started
    served = ServerLoops(directory / "store", tiny.start, tiny.paths, seed=1)
    for _ in range(server_loops):
        served.loop()
    print(f"kill loops of servers: {dict(served.counts)}", flush=True)
    return [
        (f"kill -9 of a front without HTTP and engine, in {seconds:.0f} s", _told(driven.counts)),
        ("kill -9 of the whole server", _told(served.counts)),
    ]


def _told(counts: Counts) -> str:
    return (
        f"{counts['loops']:,} loops, {counts['acknowledged']:,} acknowledged, {counts['in flight']:,} in flight "
        f"({counts['survived']:,} survived whole, {counts['vanished']:,} vanished), **lost {counts['lost']}**"
    )


def writers(directory: Path) -> Rows:
    tiny = Tiny(directory, MANY + 1)
    revisions = list(tiny.paths)
    first, others = revisions[0], revisions[1:]
    won: dict[str, str] = {}
    server = tiny.start().wait_ready()
    statuses: dict[str, Counter[int | None]] = {"register": Counter(), "replace": Counter()}
    try:
        for turn in range(TIMES + 1):
            some = others[:MANY] if turn == 0 else random.Random(turn).sample(others, FEW)
            for kind, status in (("register", 201), ("replace", 200)):
                name = f"{kind}-{turn}"
                if kind == "replace":
                    path = {"path": tiny.paths[first]}
                    assert httpx.put(f"{server.url}/v1/adapters/{name}", json=path, timeout=60).status_code == 201
                wishes = [
                    Operation(name, "register", it) if kind == "register"
                    else Operation(name, "replace", it, expected=first)
                    for it in some
                ]  # fmt: skip
                answered = at_once(server.url, wishes, tiny.paths)
                statuses[kind] += Counter(it.status for it in answered)
                [winner] = [it for it in answered if it.status == status]
                won[name] = str(winner.revision)
    finally:
        server.kill()
    server = tiny.start().wait_ready()
    try:
        for name, revision in won.items():
            assert httpx.get(f"{server.url}/v1/adapters/{name}").json()["revision"] == revision, name
    finally:
        server.stop()
    rounds = f"{MANY} clients once, {FEW} clients {TIMES} times"
    return [
        (f"POST of different weights by one name: {rounds}", _statuses(statuses["register"], 201)),
        (f"PUT with If-Match of one revision: {rounds}", _statuses(statuses["replace"], 200)),
        ("winners that are the same after kill -9 and a start", f"{len(won)} of {len(won)}"),
    ]


def _statuses(counts: Mapping[int | None, int], winner: int) -> str:
    others = ", ".join(f"{count:,} × {status}" for status, count in sorted(counts.items(), key=str) if status != winner)
    return f"{counts[winner]} × {winner}, one a round; {others}"


def histories(directory: Path, seconds: float) -> Rows:
    tiny = Tiny(directory, 6)
    server = tiny.start().wait_ready()
    try:
        history = record(server.url, 12, seconds, ["a", "b", "c"], tiny.paths)
    finally:
        server.stop()
    start = time.perf_counter()
    problems = unexplained(history)
    checking = time.perf_counter() - start
    print(Counter((it.kind, it.status) for it in history), flush=True)
    if problems:
        raise AssertionError(f"no order explains what was seen of {problems}")
    changed = sum(it.status in (200, 201) and it.kind != "read" for it in history)
    refused = sum(bool(unexplained(it)) for it in tampered(history, random.Random(0)))
    return [
        (f"12 clients on 3 names for {seconds:g} s, over HTTP",
         f"{len(history):,} operations, {changed:,} of them changes: **linearizable** (checked in {checking:.1f} s)"),
        ("the same with the answer of one successful read exchanged",
         f"{refused} of {TAMPERED} refused; the others could have been so"),
    ]  # fmt: skip


def tampered(history: Sequence[Operation], rng: random.Random) -> list[list[Operation]]:
    """Copies, in each of which one read tells of a revision that is replaced long since, or not there yet."""
    reads = [it for it in history if it.kind == "read" and it.seen]
    copies = []
    for _ in range(TAMPERED):
        victim = rng.choice(reads)
        stale = rng.choice([it.seen for it in reads if it.name == victim.name and it.seen != victim.seen])
        # only its own name's part can change
        copies.append([replace(it, seen=stale) if it is victim else it for it in history if it.name == victim.name])
    return copies


def table(rows: Rows) -> str:
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {what} | {found} |" for what, found in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default=f"{len(os.sched_getaffinity(0))} cores", help="in words, for the result")
    parser.add_argument("--only", nargs="+", choices=("scale", "steps", "kills", "writers", "histories"))
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=40, help="of steps")
    parser.add_argument("--requests", type=int, default=16, help="in each of those")
    parser.add_argument("--loops", type=int, default=500)
    parser.add_argument("--server-loops", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20, help="of history")
    parser.add_argument("--write", action="store_true", help=f"what was measured into results/{RESULTS.name}")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    sections: dict[str, Callable[[Path], Rows]] = {
        "scale": lambda it: catalogue_scale.measure(it, options.adapters),
        "steps": lambda it: catalogue_scale.step_cost(it, options.adapters, options.rounds, options.requests),
        "kills": lambda it: kills(it, options.loops, options.server_loops),
        "writers": writers,
        "histories": lambda it: histories(it, options.seconds),
    }
    titles = {"scale": f"{options.adapters:,} registered adapters", "steps": f"Steps beside {options.adapters:,}"}
    told = _written() if options.write else {}
    for name, section in sections.items():
        if options.only and name not in options.only:
            continue
        with tempfile.TemporaryDirectory(prefix="heddle-catalogue-") as made:
            rows = section(Path(made))
        title = titles.get(name, name.capitalize())
        told[title] = f"{date.today().isoformat()}, {options.machine}.\n\n{table(rows)}\n"
        print(f"## {title}\n\n{told[title]}", flush=True)
    if options.write:
        sections_told = "\n".join(f"## {title}\n\n{text}" for title, text in told.items())
        RESULTS.write_text(f"{_head()}\n{sections_told}")
    return 0


def _head() -> str:
    return (
        f"# The catalogue of adapters\n\n`python -m benchmarks.catalogue`, torch {version('torch')}, Python "
        f"{sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}. What is registered are LoRAs of rank 1 on one "
        "linear (4 kB), each with weights of its own. kill -9 ends a process and not its machine: what a disk keeps "
        "when the power fails is SQLite's and fsync's promise, which this does not test.\n"
    )


def _written() -> dict[str, str]:
    """What other sections have measured before, by title."""
    if not RESULTS.exists():
        return {}
    _, *sections = RESULTS.read_text().split("\n## ")
    return {title: text.strip() + "\n" for title, _, text in (it.partition("\n\n") for it in sections)}


if __name__ == "__main__":
    sys.exit(main())
