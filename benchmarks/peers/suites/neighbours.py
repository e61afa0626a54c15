"""Eight streams of the base, and what goes on beside them: nothing, prompts of 4,096 tokens.

Time between a stream's events. Of servers only. What they feel of adapters that come and go: benchmarks/adapters.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import psutil

from benchmarks.peers.correctness import Judge
from benchmarks.peers.load import Answer, Figures, Load, Sample, Taken, percentile
from benchmarks.peers.models import vocab_size
from benchmarks.peers.openai_stream import Refused, events, read
from benchmarks.peers.rounds import FOREIGN, Plan, say, start_all, stop_all, worded
from benchmarks.peers.systems.system import HttpSystem, Served, System
from benchmarks.served import OtherWork
from benchmarks.workload import Job

TITLE = "eight streams, and what goes on beside them"
STREAMS, PROMPT, CONTEXT, CHECKED = 8, 128, 8192, 32
WARM_UP_S, EVERY_S = 3.0, 5.0
QUIET, LONG = "quiet", "4k prompts arriving"
Beside = Callable[[HttpSystem, random.Random, float], Awaitable[Figures]]


def run(plan: Plan) -> Taken:
    directory = plan.context.models.get("llama")
    served = Served(directory, threads=plan.threads, context=CONTEXT, max_running=16)
    beside = [it for it in plan.systems if it != "vllm"]  # its base with LoRA off is the faster one
    running = start_all(replace(plan, systems=beside), served, {"http"})
    judge, taken = Judge(directory), Taken()
    seconds, rounds = float(plan.size(15, 3)), min(2, plan.rounds)
    try:
        for number in range(rounds):
            for system in running.values():
                for mode in (QUIET, LONG):
                    if mode not in {it.mode for it in taken.checks if not it.passed and it.system == system.name}:
                        _one(plan, system, mode, number, seconds, vocab_size(directory), judge, taken)
    finally:
        stop_all(running)
    return taken


def _one(
    plan: Plan, system: System, mode: str, number: int, seconds: float, vocab: int, judge: Judge, taken: Taken
) -> None:
    assert isinstance(system, HttpSystem)
    rng = random.Random(f"{mode} {number}")
    jobs = [Job([rng.randrange(4, vocab) for _ in range(PROMPT)], None) for _ in range(STREAMS)]
    for last in range(1 + plan.repeats):
        try:
            with OtherWork() as others:
                found, answers = asyncio.run(measure_streams(system, jobs, BESIDE[mode], rng, seconds))
        except (Refused, OSError, EOFError) as error:
            taken.notes.append(f"{system.name}, {mode}: {worded(error, plan.context.rooms)}")
            return
        foreign = others.share * (psutil.cpu_count() or 1)
        if foreign <= FOREIGN or last == plan.repeats:
            break
    say(f"  round {number} {system.name:13} {mode:26} {found}, {foreign:.2f} cores foreign")
    taken.samples.append(Sample(system.name, mode, number, found, round(foreign, 2)))
    checked = min(CHECKED, *(len(it.tokens) for it in answers))
    cut = [replace(it, tokens=it.tokens[:checked]) for it in answers]
    taken.checks = [it for it in taken.checks if (it.system, it.mode) != (system.name, mode)]
    taken.checks.append(judge.check(system.name, mode, Load(jobs, checked), cut))


async def measure_streams(
    system: HttpSystem, jobs: list[Job], beside: Beside, rng: random.Random, seconds: float
) -> tuple[Figures, list[Answer]]:
    """Time between the tokens of a stream for each job, while `beside` lasts, and what the streams answered."""
    system.forget()
    begun = time.perf_counter()
    bodies = [system.body(job, CONTEXT - PROMPT - 8) for job in jobs]
    streams = [asyncio.ensure_future(events(system.port, body)) for body in bodies]
    await asyncio.sleep(WARM_UP_S)
    start = time.perf_counter()
    told = await beside(system, rng, seconds)
    end = time.perf_counter()
    over = [stream for stream in streams if stream.done()]
    for stream in streams:
        stream.cancel()
    found = await asyncio.gather(*streams)
    if over:
        raise Refused("a stream ended before the measurement did")
    answers = [read(0.0, [(at - begun, data) for at, data in stream]) for stream in found]
    gaps = [1e3 * (later - earlier) for it in answers for earlier, later in zip(it.times, it.times[1:], strict=False)
            if start - begun <= earlier and later <= end - begun]  # fmt: skip
    if not gaps:
        raise Refused("no token came within the measurement")
    return {"ITL p50 ms": percentile(gaps, 0.5), "ITL p99 ms": percentile(gaps, 0.99), "ITL max ms": max(gaps),
            "tok/s": len(gaps) / (end - start), **told}, answers  # fmt: skip


async def _quiet(system: HttpSystem, rng: random.Random, seconds: float) -> Figures:
    await asyncio.sleep(seconds)
    return {}


async def _long_prompts(system: HttpSystem, rng: random.Random, seconds: float) -> Figures:
    first: list[float] = []

    async def one() -> None:
        start = time.perf_counter()
        job = Job([rng.randrange(4, 8192) for _ in range(4096)], None)
        found = await events(system.port, system.body(job, 8))
        first.append(1e3 * (found[0][0] - start))

    await every(EVERY_S, seconds, lambda _: one())
    return {"4k prompts' TTFT p50 ms": percentile(first, 0.5)}


async def every(interval: float, seconds: float, act: Callable[[int], Awaitable[Any]]) -> None:
    """Begin one every `interval` seconds, at most 16 at a time, and wait for all."""
    start, under_way, number = time.perf_counter(), set[asyncio.Future[Any]](), 0
    while (now := time.perf_counter() - start) < seconds:
        if now >= number * interval and len(under_way) < 16:
            under_way.add(asyncio.ensure_future(act(number)))
            number += 1
        else:
            await asyncio.sleep(max(0.001, number * interval - now))
        for task in [it for it in under_way if it.done()]:
            task.result()
            under_way.remove(task)
    await asyncio.gather(*under_way)


BESIDE: dict[str, Beside] = {QUIET: _quiet, LONG: _long_prompts}
