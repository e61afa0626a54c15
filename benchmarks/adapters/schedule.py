"""Who is asked when: adapters by popularity, arrivals of a Poisson process, and clients that wait for their answers."""

import asyncio
import random
import time
from collections.abc import Sequence

from benchmarks.peers.load import Answer, Load
from benchmarks.peers.openai_stream import SECONDS, events, read
from benchmarks.peers.systems.system import HttpSystem
from benchmarks.workload import Job

UNIFORM, ZIPF = "uniform", "Zipf"
POPULARITIES = (UNIFORM, ZIPF)
PROMPT_TOKENS = (32, 64)


def requests(count: int, adapters: Sequence[str], popularity: str, vocab: int, seed: int) -> list[Job]:
    """Drawn one by one: every adapter alike, or the i-th with a probability like 1 / i. No adapters: for the base.

    The prompts depend on the seed alone, so that the same work is asked of however many adapters.
    """
    rng, chooser = random.Random(f"prompts {seed}"), random.Random(f"{popularity} {seed}")
    weights = [1.0 if popularity == UNIFORM else 1 / (index + 1) for index in range(len(adapters))]
    prompts = [[rng.randrange(4, vocab) for _ in range(rng.randint(*PROMPT_TOKENS))] for _ in range(count)]
    return [Job(prompt, chooser.choices(adapters, weights)[0] if adapters else None) for prompt in prompts]


def hit_share(asked: Sequence[str], capacity: int) -> float:
    """Of the requests, how many find their adapter among the `capacity` used last, once those are there."""
    held: dict[str, None] = {}
    hits = looked = 0
    for name in asked:
        full = len(held) == capacity
        looked += full
        hits += full and name in held
        held.pop(name, None)
        held[name] = None
        if len(held) > capacity:
            del held[next(iter(held))]
    return hits / looked if looked else 1.0


def closed(system: HttpSystem, load: Load, clients: int) -> list[Answer]:
    """So many clients, each of which sends its next request when its last one has ended."""
    system.forget()
    return asyncio.run(_closed(system, load, clients))


async def _closed(system: HttpSystem, load: Load, clients: int) -> list[Answer]:
    start, waiting = time.perf_counter(), list(reversed(list(enumerate(load.jobs))))
    answers: dict[int, Answer] = {}

    async def client() -> None:
        while waiting:
            index, job = waiting.pop()
            sent = time.perf_counter()
            told = await asyncio.wait_for(events(system.port, system.body(job, load.new_tokens)), SECONDS)
            answers[index] = read(sent - start, [(at - start, data) for at, data in told])

    await asyncio.gather(*(client() for _ in range(clients)))
    return [answers[index] for index in range(len(load.jobs))]
