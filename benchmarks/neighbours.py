"""What neighbours feel: time between the tokens of eight streams while something else goes on beside them.

    python -m benchmarks.neighbours [--only SCENARIO ...] [--rounds 3] [--seconds 20] [--json FILE] [-- OPTION ...]

quiet            the eight streams of the base alone
long-prompts     prompts of 4,096 tokens arrive beside them, one every PROMPT_EVERY_S
register         adapters are registered and deleted, REGISTER_PER_S of each
register-use     registered, used for a few tokens and deleted, USE_PER_S of each

A real server over HTTP. Options behind -- are the server's. Rounds are interleaved: every scenario once, then again.
The table has medians over rounds, and of each scenario's 99th percentile over that of the same round's quiet. `cpu` is
seconds of each process a second of the measurement; `memory_mib` is what was resident when it was over.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.served import Heddle, OtherWork
from benchmarks.workload import NUM_ADAPTERS, make_llama

STREAMS, STREAM_PROMPT, CONTEXT = 8, 128, 8192
LONG_PROMPT, PROMPT_EVERY_S = 4096, 8.0
REGISTER_PER_S, USE_PER_S = 50.0, 7.0
WARM_UP_S = 3.0
VOCAB = 8192


def make_model(directory: Path) -> None:
    """make_llama's, with a context that long prompts fit in."""
    make_llama(directory)
    config = directory / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": CONTEXT}))


class Place(NamedTuple):
    """A running server."""

    port: int
    front: psutil.Process
    adapters: Path  # a directory that it may register from


class Refused(Exception):
    """The server did not do what was asked."""


async def _send(writer: asyncio.StreamWriter, method: str, path: str, body: object = None) -> None:
    content = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    )
    writer.write(head.encode() + b"\r\n" + content)
    await writer.drain()


async def _ask(port: int, method: str, path: str, body: object = None) -> Any:
    """The JSON that it answers with. Raises Refused."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        await _send(writer, method, path, body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length:")[1].split("\r\n")[0]) if "content-length:" in head else 0
        content = await reader.readexactly(length)
        if not head.split(" ")[1].startswith("2"):
            raise Refused(f"{method} {path}: {content.decode()[:300]}")
        return json.loads(content) if content else None
    finally:
        writer.close()


def _completion(model: str, prompt_tokens: int, max_tokens: int, rng: random.Random) -> dict[str, object]:
    prompt = [rng.randrange(4, VOCAB) for _ in range(prompt_tokens)]
    return {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}


async def _events(port: int, body: object) -> list[float]:
    """When each event of a stream came. What came before is kept if it is cancelled."""
    times: list[float] = []
    with suppress(asyncio.CancelledError):
        await _listen(port, body, times)
    return times


async def _listen(port: int, body: object, times: list[float]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        await _send(writer, "POST", "/v1/completions", body)
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n")[0]:
            raise Refused(f"a completion was refused: {head[:100]!r}")
        while (line := await reader.readline()) and b"[DONE]" not in line:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
    finally:
        writer.close()


Beside = Callable[[Place, random.Random, float], Awaitable[dict[str, object]]]


async def _quiet(place: Place, rng: random.Random, seconds: float) -> dict[str, object]:
    await asyncio.sleep(seconds)
    return {}


async def _every(interval: float, seconds: float, act: Callable[[int], Awaitable[None]]) -> int:
    """Begin one every `interval` seconds; returns how many ended in time. At most 16 are under way."""
    start, under_way, done = time.perf_counter(), set[asyncio.Task[None]](), 0
    number = 0
    while (now := time.perf_counter() - start) < seconds:
        if now >= number * interval and len(under_way) < 16:
            task = asyncio.ensure_future(act(number))
            under_way.add(task)
            number += 1
        else:
            await asyncio.sleep(max(0.001, number * interval - now))
        ended = {task for task in under_way if task.done()}
        for task in ended:
            task.result()
        under_way -= ended
        done += len(ended)
    await asyncio.gather(*under_way)
    return done


async def _long_prompts(place: Place, rng: random.Random, seconds: float) -> dict[str, object]:
    first_tokens: list[float] = []

    async def one(_: int) -> None:
        start = time.perf_counter()
        times = await _events(place.port, _completion("bench-base", LONG_PROMPT, 8, rng))
        first_tokens.append(times[0] - start)

    await _every(PROMPT_EVERY_S, seconds, one)
    return {"long_prompts": len(first_tokens), "long_ttft_s": statistics.median(first_tokens),
            "long_ttft_max_s": max(first_tokens)}  # fmt: skip


def _registering(rate: float, uses: bool) -> Beside:
    async def beside(place: Place, rng: random.Random, seconds: float) -> dict[str, object]:
        paths = sorted(place.adapters.iterdir())[:NUM_ADAPTERS]
        latencies: list[float] = []
        run = rng.getrandbits(32)

        async def one(number: int) -> None:
            name, path = f"new-{run}-{number}", paths[number % len(paths)]
            start = time.perf_counter()
            await _ask(place.port, "POST", "/v1/adapters", {"name": name, "path": str(path)})
            latencies.append(time.perf_counter() - start)
            if uses:
                await _events(place.port, _completion(name, STREAM_PROMPT, 4, rng))
            await _ask(place.port, "DELETE", f"/v1/adapters/{name}")

        done = await _every(1 / rate, seconds, one)
        return {"per_s": done / seconds, "register_ms": 1e3 * statistics.median(latencies)}

    return beside


SCENARIOS: dict[str, Beside] = {
    "quiet": _quiet,
    "long-prompts": _long_prompts,
    "register": _registering(REGISTER_PER_S, uses=False),
    "register-use": _registering(USE_PER_S, uses=True),
}


def measure(place: Place, scenario: str, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Time between tokens of the streams, in milliseconds, and what the scenario tells of itself. `other_work` is the
    share of the machine that went to processes which are neither this one nor its children: compare only small ones."""
    with OtherWork() as other:
        told = asyncio.run(_measure(place, scenario, seconds, seed))
    return {**told, "other_work": other.share, "memory_mib": memory_mib(place.front)}


async def _measure(place: Place, scenario: str, seconds: float, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{scenario} {seed}")
    bodies = [_completion("bench-base", STREAM_PROMPT, CONTEXT - STREAM_PROMPT - 1, rng) for _ in range(STREAMS)]
    streams = [asyncio.ensure_future(_events(place.port, body)) for body in bodies]
    await asyncio.sleep(WARM_UP_S)
    before, start = _cpu_seconds(place.front), time.perf_counter()
    told = await SCENARIOS[scenario](place, rng, seconds)
    end, after = time.perf_counter(), _cpu_seconds(place.front)
    if any(stream.done() for stream in streams):
        raise Refused("a stream ended before the measurement did: fewer seconds, or a longer context")
    for stream in streams:
        stream.cancel()
    gaps: list[float] = []
    for times in await asyncio.gather(*streams):
        within = [it for it in times if start <= it <= end]
        gaps += [1e3 * (later - earlier) for earlier, later in zip(within, within[1:], strict=False)]
    gaps.sort()
    cpu = {name: round((after[name] - before.get(name, 0.0)) / (end - start), 3) for name in after}
    return {"scenario": scenario, "tokens_per_s": len(gaps) / (end - start), "p50": gaps[len(gaps) // 2],
            "p99": gaps[int(len(gaps) * 0.99)], "max": gaps[-1], "cpu": cpu, **told}  # fmt: skip


def _cpu_seconds(front: psutil.Process) -> dict[str, float]:
    """Of the front, the engine and the processes that verify adapters."""
    seconds = {"front": 0.0, "engine": 0.0, "workers": 0.0}
    for process in (front, *front.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            name = "front" if process == front else "engine" if "engine_process" in command else "workers"
            seconds[name] += sum(process.cpu_times()[:2])
    return seconds


def memory_mib(front: psutil.Process) -> dict[str, float]:
    """Resident, of which pages of files that it shares with others count too."""
    engine = next(it for it in front.children() if "engine_process" in " ".join(it.cmdline()))
    return {"front": front.memory_info().rss / 2**20, "engine": engine.memory_info().rss / 2**20}


def run(names: Sequence[str], rounds: int, seconds: float, options: Sequence[str]) -> list[dict[str, Any]]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as made:
        make_model(Path(made))
        server = Heddle(Path(made), options=options)
        try:
            place = Place(server.port, server.front, Path(made) / "adapters")
            for number in range(rounds):
                for name in names:
                    result = measure(place, name, seconds, number) | {"round": number}
                    results.append(result)
                    print(json.dumps(result, default=lambda it: round(it, 2)), file=sys.stderr, flush=True)
        finally:
            server.stop()
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    quiet = {it["round"]: it["p99"] for it in results if it["scenario"] == "quiet"}
    lines = ["| | p50 ms | p99 ms | max ms | p99 over quiet | tok/s |", "|---|--:|--:|--:|--:|--:|"]
    for name in dict.fromkeys(it["scenario"] for it in results):
        own = [it for it in results if it["scenario"] == name]
        p50, p99, most, speed = (
            statistics.median(it[key] for it in own) for key in ("p50", "p99", "max", "tokens_per_s")
        )
        ratios = [it["p99"] / quiet[it["round"]] for it in own if it["round"] in quiet]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else "–"
        lines.append(f"| {name} | {p50:.1f} | {p99:.1f} | {most:.0f} | {ratio} | {speed:.0f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), metavar="SCENARIO")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("options", nargs="*", metavar="OPTION", help="the server's, behind --")
    options = parser.parse_args()
    results = run(options.only, options.rounds, options.seconds, options.options)
    print(table(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
