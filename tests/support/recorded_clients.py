"""Clients of /v1/adapters that write down what they asked, what they were told, and when."""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import httpx

from tests.support.linearizability import Kind, Operation, State

# most changes do something; reads tell the states apart
KINDS: tuple[Kind, ...] = ("register", "replace", "replace", "rollback", "delete", "read", "read")


def send(http: httpx.Client, it: Operation, path: str | None) -> Operation:
    """The same operation with its answer. One that breaks off is not answered. `path`: of the weights it sends."""
    place = f"/v1/adapters/{it.name}"
    begin = time.monotonic()
    try:
        match it.kind:
            case "register":
                answer = http.post("/v1/adapters", json={"name": it.name, "path": path})
            case "replace":
                match_if = {"If-Match": f'"{it.expected}"'} if it.expected is not None else {}
                answer = http.put(place, json={"path": path}, headers=match_if)
            case "rollback":
                answer = http.post(f"{place}/rollback")
            case "delete":
                answer = http.delete(place)
            case "read":
                answer = http.get(place)
    except httpx.TransportError:
        return replace(it, begin=begin)
    seen = _versions(answer) if answer.status_code < 300 and it.kind != "delete" else None
    return replace(it, begin=begin, end=time.monotonic(), status=answer.status_code, seen=seen)


def _versions(answer: httpx.Response) -> State:
    told = answer.json()
    versions = tuple(version["revision"] for version in told["versions"])
    assert told["revision"] == versions[0]
    return versions


def random_client(
    url: str, seed: int, names: Sequence[str], paths: Mapping[str, str], kinds: Sequence[Kind] = KINDS
) -> Iterator[Operation]:
    """One operation after another, for ever, until one is not answered. `paths` by revision."""
    rng, known = random.Random(seed), dict[str, str]()
    with httpx.Client(base_url=url, timeout=60) as http:
        while True:
            name, kind, revision = rng.choice(names), rng.choice(kinds), rng.choice(list(paths))
            it = Operation(name, kind, revision if kind in ("register", "replace") else None)
            if kind == "replace" and name in known and rng.random() < 0.5:
                it = replace(it, expected=known[name])
            it = send(http, it, paths[revision])
            if it.seen:
                known[name] = it.seen[0]
            yield it
            if it.status is None:
                return


def record(
    url: str, num_clients: int, seconds: float, names: Sequence[str], paths: Mapping[str, str], seed: int = 0
) -> list[Operation]:
    """What so many clients did at once on few names."""
    stop = time.monotonic() + seconds

    def run(number: int) -> list[Operation]:
        history = []
        for it in random_client(url, seed * 1000 + number, names, paths):
            history.append(it)
            if time.monotonic() > stop:
                break
        return history

    with ThreadPoolExecutor(num_clients) as pool:
        return [it for history in pool.map(run, range(num_clients)) for it in history]


def at_once(url: str, operations: Sequence[Operation], paths: Mapping[str, str]) -> list[Operation]:
    """Each by a client of its own, sent when all are connected, and again where the server has too much to verify."""
    start = Barrier(len(operations))

    def run(it: Operation) -> Operation:
        with httpx.Client(base_url=url, timeout=120) as http:
            http.get("/health")
            start.wait()
            path = paths[it.revision] if it.revision is not None else None
            while (answered := send(http, it, path)).status == 503:
                time.sleep(0.1)
            return answered

    with ThreadPoolExecutor(len(operations)) as pool:
        return list(pool.map(run, operations))


def revisions_served(url: str, places: Mapping[str, str]) -> dict[str, str]:
    """Paths of adapters by the revision that the server gives them; `places` are paths by any name."""
    found = {}
    with httpx.Client(base_url=url, timeout=60) as http:
        for number, path in enumerate(places.values()):
            answer = http.post("/v1/adapters", json={"name": f"asked-{number}", "path": path})
            assert answer.status_code == 201, answer.text
            found[answer.json()["revision"]] = path
            assert http.delete(f"/v1/adapters/asked-{number}").status_code == 200
    return found
