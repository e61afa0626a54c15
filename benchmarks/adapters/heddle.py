"""The server under measurement: how it is started, and what it tells of itself."""

import json
import re
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.suites.memory import rollup
from benchmarks.peers.systems.heddle import HeddleSystem
from benchmarks.peers.systems.system import Served

LOADS_PER_S = "loads/s"
LOADS = "heddle_adapter_loads_total"
_OF_ARENAS = "nh"  # their mappings alone ask for no huge pages (server/weights/host_arena.py), and smaps says so


def memory_options(kv_bytes: int, adapter_bytes: int, host_cache_bytes: int) -> tuple[str, ...]:
    """One budget, of which so much, and no more, is keys' and values': so that what adapters can have is known."""
    return ("--memory-budget", str(kv_bytes + adapter_bytes), "--kv-reserve", str(kv_bytes), "--kv-cache-bytes",
            str(kv_bytes), "--host-cache-bytes", str(host_cache_bytes))  # fmt: skip


def start(directory: Path, threads: int, memory: Sequence[str], max_running: int = 64) -> HeddleSystem:
    """Over directory/base; adapters below directory/adapters may be registered, and none is. Raises DidNotStart."""
    system = HeddleSystem(directory)
    options = ("--adapter-root", str(directory / "adapters"), *memory)
    system.start(Served(directory, threads=threads, max_running=max_running, options=options))
    return system


def ask(system: HeddleSystem, method: str, path: str, body: object = None) -> Any:
    """Of a short request, the JSON that it is answered with."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{system.port}{path}", content, method=method,
                                     headers={"Content-Type": "application/json"})  # fmt: skip
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def register(system: HeddleSystem, names: Sequence[str]) -> None:
    """Adapters that are called as their directories are."""
    assert system.served is not None
    for name in names:
        path = system.served.directory / "adapters" / name
        ask(system, "POST", "/v1/adapters", {"name": name, "path": str(path)})


def on_device(system: HeddleSystem) -> dict[str, int]:
    """Bytes of pages that each adapter occupies, by the server's account."""
    listed = ask(system, "GET", "/v1/adapters?limit=1000")["data"]
    return {it["id"]: it["device"]["bytes"] for it in listed if it["device"]["state"] == "resident"}


def loads(system: HeddleSystem) -> float:
    """Since the server started."""
    return metric(system, LOADS)


def metric(system: HeddleSystem, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{system.port}/metrics", timeout=60) as answer:
        return counted(answer.read().decode(), name)


def counted(metrics: str, name: str) -> float:
    """The sum of a metric's series, of which there may be none yet. A metric that is not there is refused: it would
    read as if nothing had happened."""
    if f"# TYPE {name} " not in metrics:
        raise LookupError(f"the server has no metric {name}")
    return sum(map(float, re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", metrics, re.MULTILINE)))


def engine(system: HeddleSystem) -> psutil.Process:
    return next(it for it in system.processes() if "engine_process" in " ".join(it.cmdline()))


def resident(process: psutil.Process) -> dict[str, int]:
    """Bytes of its memory: whole (Rss, Pss), what is nobody else's and of no file (Anonymous), and that of arenas."""
    parts = {part: rollup(process.pid, part) for part in ("Rss", "Pss", "Anonymous")}
    return parts | {"arenas": arenas_of(Path(f"/proc/{process.pid}/smaps").read_text())}


def arenas_of(smaps: str) -> int:
    """Resident bytes of the mappings that arenas made."""
    total = size = 0
    for line in smaps.splitlines():
        if line.startswith("Rss:"):
            size = int(line.split()[1]) * 1024
        elif line.startswith("VmFlags:") and _OF_ARENAS in line.split():
            total += size
    return total
