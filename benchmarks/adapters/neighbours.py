"""Eight streams of the base decode steadily, and beside them adapters come and go: time between the streams' tokens.

A mixture of 61 million parameters; ESFT adapters of 25 MB each, LoRA on attention of 0.8. The device has room for
three of the ESFT adapters. Beside each mode stands how much of it was done, and how many adapters were loaded. Whoever
uses an adapter asks for 4 tokens after a prompt of 8, and must get what that adapter answers when nothing else goes
on; for a replaced name, what its new weights answer.

- resident: an adapter that stays on the device is used 4 times a second: what the uses cost that other modes make too
- registered: 50 LoRA adapters a second are registered, verified and deleted, and never used
- first used: 4 ESFT adapters a second are registered, used and deleted, so each use has to load
- replaced: 4 times a second a name gets other ESFT weights (PUT) and is used; three names take four weights in turn
- evicted: four ESFT adapters are used in turn, 4 times a second, which is one more than there is room for
- all at once: the last four of these
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.adapters import heddle
from benchmarks.adapters.found import HEDDLE, Found, all_right, over, quietly
from benchmarks.peers import plots
from benchmarks.peers.correctness import SAMPLE, Judge
from benchmarks.peers.load import Answer, Check, Figures, Load, Sample
from benchmarks.peers.models import adapters_bytes, vocab_size
from benchmarks.peers.openai_stream import Refused, ask, events, read
from benchmarks.peers.rounds import Plan, say, worded
from benchmarks.peers.suites.neighbours import CHECKED, PROMPT, QUIET, STREAMS, every, measure_streams
from benchmarks.peers.systems.heddle import HeddleSystem
from benchmarks.peers.systems.system import HttpSystem
from benchmarks.workload import Job

TITLE = "What neighbours feel of adapters that come and go"
RESIDENT, ALL = "resident", "all at once"
P50, P99, WORST = "ITL p50 ms", "ITL p99 ms", "ITL max ms"
COMPARED = (P50, P99, WORST, "tok/s")
USED_PROMPT, USED_TOKENS = 8, 4
KV_BYTES, ROOM = 1 << 30, 3.2  # room on the device, in ESFT adapters
STANDING, FRESH, OTHERS = (tuple(f"esft-{4 * part + index}" for index in range(4)) for part in range(3))
LORA = tuple(f"lora-{index}" for index in range(8))
_NAMES = 3  # that are replaced: one less than there are weights for them, so that each gets others every time
_PROMPTS = 50  # tried, until all adapters answer differently


class Activity(NamedTuple):
    """Begun so often a second; `act` gets the number of each."""

    per_s: float
    act: Callable[[int], Awaitable[None]]


class Beside:
    """What is done to adapters, and whether they answer right. `expected`: by the weights' directory."""

    def __init__(self, system: HeddleSystem, directory: Path, expected: dict[str, list[int]], job: Job) -> None:
        self._system, self._adapters, self._expected, self._job = system, directory / "adapters", expected, job
        self._locks: list[asyncio.Lock] = []  # a name that is being replaced; they belong to an event loop
        self.wrong: list[str] = []
        self.asked = 0
        self.done: dict[str, int] = {}
        self._run = 0

    def activities(self) -> dict[str, Activity]:
        return {
            "registered": Activity(50.0, self._register),
            "first used": Activity(4.0, self._first_use),
            "replaced": Activity(4.0, self._replace),
            "evicted": Activity(4.0, lambda number: self._use("evicted", STANDING[number % len(STANDING)])),
            RESIDENT: Activity(4.0, lambda number: self._use(RESIDENT, STANDING[0])),
        }

    async def go_on(self, mode: str, seconds: float) -> Figures:
        """For so long; how often a second each was done."""
        self._run += 1
        self._locks = [asyncio.Lock() for _ in range(_NAMES)]
        self.done, known = {}, self.activities()
        names = [name for name in known if name != RESIDENT] if mode == ALL else [mode] if mode in known else []
        before = await asyncio.to_thread(heddle.loads, self._system)
        await asyncio.gather(
            asyncio.sleep(seconds), *(every(1 / known[it].per_s, seconds, known[it].act) for it in names)
        )
        loads = await asyncio.to_thread(heddle.loads, self._system) - before
        return {heddle.LOADS_PER_S: loads / seconds} | {f"{name}/s": self.done.get(name, 0) / seconds for name in names}

    async def _register(self, number: int) -> None:
        name = f"registered-{self._run}-{number}"
        await self._ask("POST", "/v1/adapters", {"name": name, "path": self._path(LORA[number % len(LORA)])})
        await self._ask("DELETE", f"/v1/adapters/{name}")
        self._count("registered")

    async def _first_use(self, number: int) -> None:
        name, source = f"fresh-{self._run}-{number}", FRESH[number % len(FRESH)]
        await self._ask("POST", "/v1/adapters", {"name": name, "path": self._path(source)})
        await self._use("first used", name, source)
        await self._ask("DELETE", f"/v1/adapters/{name}")

    async def _replace(self, number: int) -> None:
        name, source = f"replaced-{number % _NAMES}", OTHERS[number % len(OTHERS)]
        async with self._locks[number % _NAMES]:
            await self._ask("PUT", f"/v1/adapters/{name}", {"path": self._path(source)})
            await self._use("replaced", name, source)

    async def _use(self, activity: str, name: str, source: str = "") -> None:
        """`source`: whose answer it must be, where the name does not say so."""
        body = self._system.body(Job(self._job.prompt, name), USED_TOKENS)
        tokens = read(0.0, await events(self._system.port, body)).tokens
        wanted = self._expected[source or name]
        self.asked += 1
        if list(tokens) != wanted:
            self.wrong.append(f"{activity} ({source or name}): {list(tokens)}, not {wanted}")
        self._count(activity)

    async def _ask(self, method: str, path: str, body: object = None) -> None:
        await ask(self._system.port, method, path, body)

    def _path(self, source: str) -> str:
        return str(self._adapters / source)

    def _count(self, activity: str) -> None:
        self.done[activity] = self.done.get(activity, 0) + 1


LOADING = ("first used", "replaced", "evicted")
MODES = (QUIET, RESIDENT, "registered", *LOADING, ALL)


def run(plan: Plan, found: Found) -> None:
    directory = plan.context.models.get("mixture-12")
    judge = Judge(directory)
    room = int(ROOM * adapters_bytes(directory, [STANDING[0]]))
    system = heddle.start(directory, plan.threads, heddle.memory_options(KV_BYTES, room, 4 * room), max_running=128)
    try:
        expected, job = _expected(system, directory, judge, found)
        beside = Beside(system, directory, expected, job)
        for number in range(plan.rounds):
            for mode in reversed(MODES) if number % 2 else MODES:
                if mode not in {it.mode for it in found.checks if not it.passed}:
                    _one(plan, system, mode, number, beside, judge, found)
    finally:
        system.stop()
    found.tables["Over the quiet streams of the same round"] = over(found, QUIET, MODES[1:], COMPARED)
    found.tables["Over the streams beside uses of an adapter that stays"] = over(found, RESIDENT, LOADING, COMPARED)
    found.pictures["neighbours"] = plots.bars(TITLE, P99, found.samples, found.checks)


def _expected(system: HeddleSystem, directory: Path, judge: Judge, found: Found) -> tuple[dict[str, list[int]], Job]:
    """What each ESFT adapter answers to a prompt when nothing else goes on, which must be what Transformers says. No
    two answer alike, so that one that is taken for another is seen. Only STANDING stay registered."""
    names = (*STANDING, *FRESH, *OTHERS)
    heddle.register(system, names)
    for seed in range(_PROMPTS):
        rng = random.Random(f"used {seed}")
        prompt = [rng.randrange(4, vocab_size(directory)) for _ in range(USED_PROMPT)]
        jobs = [Job(prompt, name) for name in names]
        answers = [system.run(Load([it], USED_TOKENS))[0] for it in jobs]
        if len({tuple(it.tokens) for it in answers}) == len(names):
            break
    else:
        raise ValueError(f"adapters answer alike to each of {_PROMPTS} prompts")
    for start in range(0, len(names), SAMPLE):  # no more are read at a time
        part = slice(start, start + SAMPLE)
        found.checks.append(judge.check(HEDDLE, "adapters alone", Load(jobs[part], USED_TOKENS), answers[part]))
    for name in (*FRESH, *OTHERS):
        heddle.ask(system, "DELETE", f"/v1/adapters/{name}")
    return {name: list(answer.tokens) for name, answer in zip(names, answers, strict=True)}, jobs[0]


def _one(plan: Plan, system: HeddleSystem, mode: str, number: int, beside: Beside, judge: Judge, found: Found) -> None:
    rng = random.Random(f"{mode} {number}")
    assert system.served is not None
    vocab, seconds = vocab_size(system.served.directory), float(plan.size(20, 2))
    jobs = [Job([rng.randrange(4, vocab) for _ in range(PROMPT)], None) for _ in range(STREAMS)]

    async def act(system: HttpSystem, rng: random.Random, seconds: float) -> Figures:
        return await beside.go_on(mode, seconds)

    def take() -> tuple[Figures, list[Answer]]:
        return asyncio.run(measure_streams(system, jobs, act, rng, seconds))

    beside.wrong, beside.asked = [], 0
    try:
        (figures, answers), foreign = quietly(take, plan.repeats)
    except (Refused, OSError, EOFError) as error:
        found.checks.append(Check(HEDDLE, mode, False, note=worded(error, plan.context.rooms)))
        return
    say(f"  round {number} {mode:12} {figures}, {foreign:.2f} cores foreign")
    found.samples.append(Sample(HEDDLE, mode, number, figures, foreign))
    checked = min(CHECKED, *(len(it.tokens) for it in answers))
    cut = [Answer(it.tokens[:checked], it.sent, it.end) for it in answers]
    found.checks.append(judge.check(HEDDLE, mode, Load(jobs, checked), cut))
    if mode not in (QUIET, "registered"):
        found.checks.append(all_right(mode, beside.wrong, beside.asked))
