"""What very many registered adapters cost a server that uses few of them (benchmarks/catalogue.py prints it)."""

import http.client
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

from adapters_store.catalog import Catalog
from adapters_store.records import Target, Version
from adapters_store.rules import Rules
from adapters_store.store.store import open_store
from adapters_store.verify import Verified, answer
from benchmarks.against import interval
from benchmarks.served import Heddle
from benchmarks.workload import Job, make_jobs, make_llama
from server.lifecycle.models import meaning_of
from server.lifecycle.registry import Registry
from server.storage import remembered
from tests.support.distinct_adapters import save_distinct, save_small

BASE, LINEAR, WIDTH, VOCAB = "bench-base", "model.layers.0.self_attn.q_proj", 512, 8192
STARTS, LOOK_UPS, ASKED, POSTS, ALIASES = 5, 20_000, 1000, 400, 100
PAGE = 100
Rows = list[tuple[str, str]]


class Scale:
    """Two stores over one base: an empty one, and one with `count` adapters, made in `directory`."""

    def __init__(self, directory: Path, count: int) -> None:
        self.directory, self.count = directory, count
        self.empty, self.large = directory / "empty", directory / "large"
        make_llama(directory)
        self._small = save_small(directory / "small", LINEAR, WIDTH, WIDTH)
        (directory / "more").mkdir()

    @contextmanager
    def server(self, store: Path) -> Iterator[Heddle]:
        options = ("--store", str(store), "--adapter-root", str(self.directory / "more"), "--threads", "1")
        heddle = Heddle(self.directory, options=options)
        try:
            yield heddle
        finally:
            heddle.stop()

    def fill(self) -> float:
        """Everything that registration does but HTTP and the process that verifies. Returns adapters a second."""
        with self.server(self.large):
            pass  # now the store knows its base
        store = open_store(self.large)
        catalog, identity = Catalog(BASE), remembered(store)
        seconds = 0.0
        with tempfile.TemporaryDirectory() as made:
            rules = Rules(identity.base, (Path(made),), identity.room)
            for path in save_distinct(Path(made), self._small, self.count, prefix="many-"):
                start = time.perf_counter()
                with store.blobs.desk() as desk:
                    verified = answer(rules.job(str(path), (), desk))
                    assert isinstance(verified, Verified), verified
                    version = Version(verified.weights.revision, path.name, int(time.time()))
                    change = catalog.registered(path.name, verified.weights, version, True)
                    assert change is not None
                    store.commit(change, "benchmark", (verified.weights, verified.content))
                catalog.apply(change)
                seconds += time.perf_counter() - start
        for index in range(ALIASES):
            targets = (Target(f"many-{index}", 1.0), Target(f"many-{index + 1}", 2.0))
            change = catalog.aliased(f"alias-{index}", targets, int(time.time()))
            store.commit(change, "benchmark")
            catalog.apply(change)
        store.close()
        return self.count / seconds


def starts(scale: Scale) -> Rows:
    """In turns, so that what disturbs the machine disturbs both."""
    seconds: dict[Path, list[float]] = {scale.empty: [], scale.large: []}
    memory: dict[Path, list[float]] = {scale.empty: [], scale.large: []}
    for _ in range(STARTS):
        for store in seconds:
            start = time.perf_counter()
            with scale.server(store) as heddle:
                seconds[store].append(time.perf_counter() - start)
                memory[store].append(front_of(heddle).memory_info().rss / 2**20)
    registry = _loaded(scale)
    registry.store.close()
    start = time.perf_counter()
    again = _loaded(scale)
    loading = time.perf_counter() - start
    again.store.close()
    told = []
    for what, values, unit in (("until /health says 200", seconds, "s"), ("memory of the front", memory, "MB")):
        few, many = (statistics.median(values[store]) for store in (scale.empty, scale.large))
        told.append((what, f"{few:.1f} {unit} empty, {many:.1f} {unit} with {scale.count:,}: {many - few:+.1f} {unit}"))
    return [told[0], ("of which reading the catalogue takes", f"{loading:.2f} s"), told[1]]


def _loaded(scale: Scale) -> Registry:
    registry = Registry(Catalog(BASE), open_store(scale.large), True)
    registry.load()
    return registry


def look_ups(scale: Scale) -> Rows:
    """`meaning_of` in this process."""
    registry = _loaded(scale)
    catalog, rng = registry.catalog, random.Random(1)
    names = [rng.choice(list(catalog)).name for _ in range(LOOK_UPS // 10)] * 10
    asked: dict[str, list[tuple[str, str | None]]] = {
        "by name": [(name, None) for name in names],
        "by name@prefix of 12": [(f"{name}@{catalog.get(name).current.revision[:12]}", None) for name in names],
        "by alias, for a user": [
            (f"alias-{rng.randrange(ALIASES)}", f"user-{rng.randrange(1000)}") for _ in range(LOOK_UPS)
        ],
    }
    told = []
    for what, models in asked.items():
        taken = []
        for model, user in models:
            start = time.perf_counter_ns()
            meaning_of(model, catalog, user)
            taken.append((time.perf_counter_ns() - start) / 1e3)
        told.append((f"look-up {what}, in process", _quantiles(taken, "us")))
    registry.store.close()
    return told


def over_http(scale: Scale, heddle: Heddle) -> Rows:
    connection = http.client.HTTPConnection("127.0.0.1", heddle.port)
    rng = random.Random(2)

    def get(path: str) -> bytes:
        connection.request("GET", path)
        response = connection.getresponse()
        raw = response.read()
        assert response.status == 200, raw
        return raw

    def timed(paths: Sequence[str]) -> list[float]:
        taken = []
        for path in paths:
            start = time.perf_counter()
            get(path)
            taken.append((time.perf_counter() - start) * 1e3)
        return taken

    base = timed([f"/v1/models/{BASE}"] * ASKED)
    one = timed([f"/v1/models/many-{rng.randrange(scale.count)}" for _ in range(ASKED)])
    start, pages, after = time.perf_counter(), [], ""
    while True:
        begin = time.perf_counter()
        page = json.loads(get(f"/v1/adapters?limit={PAGE}{after}"))
        pages.append((time.perf_counter() - begin) * 1e3)
        if not page["has_more"]:
            break
        after = f"&after={page['last_id']}"
    walked = time.perf_counter() - start
    whole = statistics.median(timed(["/v1/models"] * 3))
    connection.close()
    return [
        ("GET /v1/models/{base}", _quantiles(base, "ms")),
        ("GET /v1/models/{name}", _quantiles(one, "ms")),
        (f"GET /v1/adapters, a page of {PAGE}", _quantiles(pages, "ms")),
        (f"all {len(pages)} pages one after another", f"{walked:.1f} s"),
        ("GET /v1/models, all at once", f"{whole:.0f} ms"),
    ]


def posts(scale: Scale, heddle: Heddle) -> Rows:
    """Real registrations, one after another and by four clients."""
    save_distinct(scale.directory / "more", scale._small, 2 * POSTS, first=scale.count, prefix="posted-")

    def send(numbers: Sequence[int]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", heddle.port)
        for number in numbers:
            body = json.dumps({"name": f"posted-{number}", "path": f"../more/posted-{number}"})
            connection.request("POST", "/v1/adapters", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            told = response.read()
            assert response.status == 201, told
        connection.close()

    told = []
    for clients, first in ((1, scale.count), (4, scale.count + POSTS)):
        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(send, [range(first + it, first + POSTS, clients) for it in range(clients)]))
        rate = POSTS / (time.perf_counter() - start)
        told.append((f"POST /v1/adapters, {clients} client{'s' * (clients > 1)}", f"{rate:.0f} a second"))
    return told


def step_cost(directory: Path, count: int, rounds: int, requests: int) -> Rows:
    """CPU time of the engine's process a token, with the large store over the empty one; the same requests in turns."""
    scale = Scale(directory, count)
    scale.fill()
    adapters = sorted(path.name for path in (scale.directory / "adapters").iterdir())
    with scale.server(scale.empty) as few, scale.server(scale.large) as many:
        ratios: list[float] = []
        for index in range(-1, rounds):
            jobs = make_jobs(requests, [None, *adapters], VOCAB, seed=index)
            order = (few, many) if index % 2 else (many, few)
            costs = {heddle: _engine_seconds(heddle, jobs) for heddle in order}
            if index >= 0:  # adapters came into memory in the first
                ratios.append(costs[many] / costs[few])
                print(f"round {index}: engine's CPU a token, many over none {ratios[-1]:.3f}", flush=True)
    low, high = interval(ratios)
    quarters = statistics.quantiles(ratios, n=4)
    return [
        ("with them over without, median of the rounds", f"{statistics.median(ratios):.3f}"),
        ("95 % interval of the mean", f"{low:.3f} to {high:.3f}"),
        ("half of the rounds lie within", f"{quarters[0]:.3f} to {quarters[2]:.3f}"),
        ("rounds", f"{rounds} of {requests} requests, 64 tokens each, base and 8 adapters"),
    ]


def _engine_seconds(heddle: Heddle, jobs: list[Job]) -> float:
    """CPU time that its process spends on them; every job has as many tokens."""
    engine = next(it for it in front_of(heddle).children() if "server.engine_process" in it.cmdline())
    before = sum(engine.cpu_times()[:2])
    heddle.run(jobs)
    return sum(engine.cpu_times()[:2]) - before


def front_of(heddle: Heddle) -> psutil.Process:
    return psutil.Process(heddle._process.pid)


def _quantiles(taken: Sequence[float], unit: str) -> str:
    cuts = statistics.quantiles(taken, n=100)
    return f"p50 {statistics.median(taken):.3g} {unit}, p99 {cuts[98]:.3g} {unit}"


def measure(directory: Path, count: int) -> Rows:
    scale = Scale(directory, count)
    rate = scale.fill()
    rows = [("registered in bulk: verified, copied, synced and committed, without HTTP", f"{rate:.0f} a second")]
    print(rows[0], flush=True)
    for part in (starts, look_ups):
        rows += part(scale)
        print(*rows, sep="\n", flush=True)
    with scale.server(scale.large) as heddle:
        rows += over_http(scale, heddle)
        rows += posts(scale, heddle)
    return rows
