"""What one adapter feels of another that asks for more than the server has: time to its first token, time between its
tokens, and how two that ask without end share the server.

Two LoRA adapters of rank 8 on a Llama, both always on the device, and 16 places. Adapter B asks for 32 tokens after a
prompt of 128, every 1.5 s; adapter A keeps the server busy. None of B's prompts is found in the prefix cache.

- quiet: A asks for nothing
- 200 requests of one: A has 200 HTTP requests of 400 tokens each under way all the time, 184 of which wait
- 2 requests of 128: A has two under way, each of 8 prompts with n = 16 and 400 tokens, as many as one may have
- 200 long prompts: A has 200 HTTP requests of 4 tokens after prompts of 1,500 under way
- weights 1 and 1, 1 and 3: A and B have 40 requests each under way all the time, of 32 tokens; in tokens that were
  generated for B, over those for A

"Steps" is the time to B's first token over the median time between B's tokens beside the same flood, which is a step's:
when B comes a step is under way and the next one has been prepared; then its prompt is computed, in several steps where
they would otherwise keep those who decode waiting.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from benchmarks.adapters import heddle
from benchmarks.adapters.found import HEDDLE, Found, all_right, over, quietly
from benchmarks.peers import plots
from benchmarks.peers.correctness import SAMPLE, Judge
from benchmarks.peers.load import Answer, Check, Figures, Load, Sample, figures, percentile
from benchmarks.peers.models import adapters_bytes, vocab_size
from benchmarks.peers.openai_stream import Event, Refused, read, stream
from benchmarks.peers.rounds import Plan, say, worded
from benchmarks.peers.suites.neighbours import PROMPT, QUIET, WARM_UP_S, every
from benchmarks.peers.systems.heddle import HeddleSystem
from benchmarks.workload import Job

TITLE, SHARED = "What an adapter feels of another one's flood", "How two adapters share that both ask without end"
MANY, LARGE, PROMPTS = "200 requests of one", "2 requests of 128", "200 long prompts"
P50, P90, WORST = "TTFT p50 ms", "TTFT p90 ms", "TTFT max ms"
BETWEEN, STEPS = "ITL p50 ms", "TTFT p90, steps"
OVER, RATIO, OFF = "B over quiet, in the same round", "B over A, tokens", "off the weights, %"
A, B = "lora-0", "lora-2"
PLACES, NEW_TOKENS, EVERY_S = 16, 32, 1.5
KV_BYTES = 1 << 30
Request = tuple[Job, Mapping[str, Any]]  # and its body
Known = Mapping[tuple[str, tuple[int, ...]], list[int]]  # by adapter and prompt: the answer when nothing else goes on


class Flood(NamedTuple):
    """Requests of A under way all the time."""

    under_way: int
    num_prompts: int = 1
    n: int = 1
    prompt: int = PROMPT
    new_tokens: int = 400


FLOODS = {QUIET: Flood(0), MANY: Flood(200), LARGE: Flood(2, 8, 16), PROMPTS: Flood(200, prompt=1500, new_tokens=4)}
WEIGHTS = {"weights 1 and 1": 1.0, "weights 1 and 3": 3.0}  # of B; A's is 1
MODES = (*FLOODS, *WEIGHTS)
BACKLOG, PATIENCE_S = 40, 120.0


class Clients:
    """Of both adapters."""

    def __init__(self, system: HeddleSystem, known: Known, seed: str) -> None:
        self._system, self._known, self._rng = system, known, random.Random(seed)
        self._asked: list[tuple[Job, float, list[Event]]] = []  # when it was sent, and what has come of it so far

    def known(self, adapter: str) -> Request:
        self._system.forget()  # each time: prompts come again
        job = Job(list(self._rng.choice([prompt for name, prompt in self._known if name == adapter])), adapter)
        return job, self._system.body(job, NEW_TOKENS)

    def flooding(self, flood: Flood) -> Request:
        prompts = draw(self._rng, self._system, flood.num_prompts, flood.prompt)
        job, more = Job(prompts[0], A), {"prompt": prompts, "n": flood.n, "temperature": 1.0}  # not all alike
        return job, self._system.body(job, flood.new_tokens) | more

    async def ask(self, request: Request) -> None:
        (job, body), came = request, list[Event]()
        self._asked.append((job, time.perf_counter(), came))
        async for event in stream(self._system.port, body):
            came.append(event)
        if not came:
            raise Refused("an answer without a token")

    @asynccontextmanager
    async def always(self, *makers: Callable[[], Request]) -> AsyncIterator[None]:
        """Clients who ask for the next one when one has ended. Entered when all have been at it a while."""

        async def client(make: Callable[[], Request]) -> None:
            while True:
                await self.ask(make())

        tasks = [asyncio.ensure_future(client(make)) for make in makers]
        await asyncio.sleep(WARM_UP_S)
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for it in ended:
            if isinstance(it, Exception):  # CancelledError is none
                raise it

    def answers(self, adapter: str) -> list[tuple[Job, Answer]]:
        """To those of whom something has come."""
        return [(job, read(sent, came)) for job, sent, came in self._asked if job.adapter == adapter and came]

    async def beside(self, mode: str, seconds: float) -> Figures:
        """What B feels."""
        async with self.always(*[lambda: self.flooding(FLOODS[mode])] * FLOODS[mode].under_way):
            begin = time.perf_counter()
            await every(EVERY_S, seconds, lambda _: asyncio.wait_for(self.ask(self.known(B)), PATIENCE_S))
            waiting = await asyncio.to_thread(heddle.metric, self._system, "vllm:num_requests_waiting")
        told = felt([answer for _, answer in self.answers(B)])
        if mode != QUIET:
            told |= {"A tok/s": per_s(self.answers(A), begin, seconds), "A waiting": waiting}
            told[STEPS] = told[P90] / told[BETWEEN]
        return told

    async def shared(self, mode: str, seconds: float) -> Figures:
        async with self.always(*[lambda: self.known(A), lambda: self.known(B)] * BACKLOG):
            begin = time.perf_counter()
            await asyncio.sleep(seconds)
        ours, theirs = (per_s(self.answers(it), begin, seconds) for it in (B, A))
        off = 100 * abs(ours / theirs / WEIGHTS[mode] - 1)
        return {"tok/s": ours, "A tok/s": theirs, RATIO: ours / theirs, OFF: off}


def run(plan: Plan, found: Found) -> None:
    directory = plan.context.models.get("llama")
    memory = heddle.memory_options(KV_BYTES, 2 * adapters_bytes(directory, [A, B]), 0)
    system = heddle.start(directory, plan.threads, memory, max_running=PLACES)
    try:
        known = _known(system, Judge(directory), found)
        for number in range(plan.rounds):
            for mode in reversed(MODES) if number % 2 else MODES:
                if mode not in {it.mode for it in found.checks if not it.passed}:
                    _one(plan, system, mode, number, known, found)
    finally:
        system.stop()
    found.tables[OVER] = over(found, QUIET, [*FLOODS][1:], (P50, P90, WORST, BETWEEN))
    found.pictures["fairness-ttft"] = plots.bars(TITLE, P90, found.samples, found.checks)
    found.pictures["fairness-weights"] = plots.bars(SHARED, RATIO, found.samples, found.checks)


def _known(system: HeddleSystem, judge: Judge, found: Found) -> Known:
    """Asked one after another, and as Transformers says."""
    heddle.register(system, [A, B])
    jobs = [Job(prompt, name) for prompt in draw(random.Random(0), system, SAMPLE // 2, PROMPT) for name in (A, B)]
    answers = [system.run(Load([it], NEW_TOKENS))[0] for it in jobs]
    found.checks.append(judge.check(HEDDLE, "each alone", Load(jobs, NEW_TOKENS), answers))
    return {(job.adapter or "", tuple(job.prompt)): list(it.tokens) for job, it in zip(jobs, answers, strict=True)}


def _one(plan: Plan, system: HeddleSystem, mode: str, number: int, known: Known, found: Found) -> None:
    assert system.served is not None
    for name, weight in ((A, 1.0), (B, WEIGHTS.get(mode, 1.0))):
        path = str(system.served.directory / "adapters" / name)
        heddle.ask(system, "PUT", f"/v1/adapters/{name}", {"path": path, "manifest": {"weight": weight}})

    def take() -> tuple[Figures, Clients]:
        clients = Clients(system, known, f"{mode} {number}")
        if mode in WEIGHTS:
            return asyncio.run(clients.shared(mode, float(plan.size(20, 6)))), clients
        return asyncio.run(clients.beside(mode, float(plan.size(45, 9)))), clients

    try:
        (taken, clients), foreign = quietly(take, plan.repeats)
        pairs = [it for name in ((A, B) if mode in WEIGHTS else (B,)) for it in clients.answers(name)]
    except (Refused, OSError, EOFError) as error:
        found.checks.append(Check(HEDDLE, mode, False, note=worded(error, plan.context.rooms)))
        return
    say(f"  round {number} {mode:20} {taken}, {foreign:.2f} cores foreign")
    found.samples.append(Sample(HEDDLE, mode, number, taken, foreign))
    found.checks.append(as_alone(mode, pairs, known))


def as_alone(mode: str, answers: Sequence[tuple[Job, Answer]], known: Known) -> Check:
    """What was cancelled when the time was over is the beginning of an answer."""
    pairs = [(it.tokens, known[job.adapter or "", tuple(job.prompt)]) for job, it in answers]
    cut = [(told, wanted if mode in FLOODS else wanted[: len(told)]) for told, wanted in pairs]
    wrong = [f"{told}, not {wanted}" for told, wanted in cut if told != wanted]
    return all_right(mode, wrong, len(pairs))


def per_s(answers: Sequence[tuple[Job, Answer]], begin: float, seconds: float) -> float:
    """Tokens that came within a time."""
    return sum(begin <= at <= begin + seconds for _, answer in answers for at in answer.times) / seconds


def felt(answers: Sequence[Answer]) -> Figures:
    first = [1e3 * (it.times[0] - it.sent) for it in answers]
    whole = figures(answers, 0.0, 0.0)
    return {P50: percentile(first, 0.5), P90: percentile(first, 0.9), WORST: max(first),
            **{unit: whole[unit] for unit in (BETWEEN, "TPOT p50 ms", "tok/s")}}  # fmt: skip


def draw(rng: random.Random, system: HeddleSystem, count: int, length: int) -> list[list[int]]:
    """Prompts."""
    assert system.served is not None
    vocab = vocab_size(system.served.directory)
    return [[rng.randrange(4, vocab) for _ in range(length)] for _ in range(count)]
