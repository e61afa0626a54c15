"""Time to the first token against how many adapters are in use, in multiples of what fits on the device.

Two kinds of adapters, each on its own base: LoRA on all linears of a Llama (2 and 5 MB in turns, 8 fit), and ESFT on
a mixture (25 MB, 4 fit). Each request draws its adapter: all alike, or the i-th with a probability like 1 / i (Zipf).
Open loop: requests come as a Poisson process, 60 % of what the base answers a second in the same run with 16 clients;
they come whether others wait or not, so a server that falls behind shows it. Closed loop: 16 clients, each with one
request at a time. Prompts of 32 to 64 tokens, 8 new ones, the same whatever the number of adapters. The adapters that
are asked for first are on the device when a cell begins. A cliff would be a step that is far larger than those beside
it.

"Hits" is arithmetic: the share of requests that find their adapter among those used last, of as many as fit. The others
would have to load, were requests served one by one; "loads/request" is what was done.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from benchmarks.adapters import curves, heddle
from benchmarks.adapters.found import HEDDLE, Found, Row, quietly, spread
from benchmarks.adapters.schedule import POPULARITIES, closed, hit_share, requests
from benchmarks.peers.correctness import Judge
from benchmarks.peers.load import Answer, Check, Figures, Load, Sample, figures, percentile, poisson
from benchmarks.peers.models import adapters_bytes, vocab_size
from benchmarks.peers.openai_stream import Refused
from benchmarks.peers.report import is_sound
from benchmarks.peers.rounds import Plan, say, worded
from benchmarks.peers.summary import ratios
from benchmarks.peers.systems.heddle import HeddleSystem
from benchmarks.workload import Job

TITLE = "Time to the first token against adapters per room"
RATIOS = (1, 2, 4, 16)
RATE, CLIENTS, NEW_TOKENS = 0.6, 16, 8
OPEN, CLOSED = "open", "closed"
LOOPS = (OPEN, CLOSED)
P50, P90, P99 = "TTFT p50 ms", "TTFT p90 ms", "TTFT p99 ms"
KV_BYTES = 512 << 20


@dataclass(frozen=True)
class Kind:
    """Of adapters: `prefix`-i of a model; `room`: how many of them fit on the device."""

    name: str
    model: str
    prefix: str
    room: int

    def names(self, ratio: int) -> list[str]:
        return [f"{self.prefix}-{index}" for index in range(self.room * ratio)]


KINDS = (Kind("LoRA", "llama-128", "lora", 8), Kind("ESFT", "mixture-64", "esft", 4))
QUICK = (Kind("LoRA", "llama-32", "lora", 2),)


@dataclass(frozen=True)
class Cell:
    kind: Kind
    loop: str
    popularity: str
    ratio: int

    @property
    def mode(self) -> str:
        return f"{self.line}, {self.ratio}x"

    @property
    def line(self) -> str:
        """What is compared with itself at other ratios."""
        return f"{self.kind.name}, {self.loop}, {self.popularity}"


def run(plan: Plan, found: Found) -> None:
    kinds = QUICK if plan.quick else KINDS
    for kind in kinds:
        _of_kind(plan, kind, found)
    found.tables["Growth of the time to the first token over 1x, medians of the rounds' ratios"] = growth(found, kinds)
    for loop in LOOPS:
        for kind in kinds:
            texts = curves.draw(f"{TITLE}: {kind.name}, {loop} loop", lines(found, kind, loop), RATIOS)
            found.pictures[f"ttft-{kind.name.lower()}-{loop}"] = texts


def _of_kind(plan: Plan, kind: Kind, found: Found) -> None:
    directory = plan.context.models.get(kind.model)
    most, vocab, count = kind.names(max(RATIOS)), vocab_size(directory), plan.size(200, 12)
    room = int(1.02 * adapters_bytes(directory, most[: kind.room]))
    memory = heddle.memory_options(KV_BYTES, room, 4 * room)
    system = heddle.start(directory, plan.threads, memory)
    judge, last = Judge(directory), dict[str, tuple[Load, list[Answer]]]()
    cells = [Cell(kind, *it) for it in product(LOOPS, POPULARITIES, RATIOS)]
    try:
        heddle.register(system, most)
        per_s = RATE * _base_rate(system, requests(count, [], "", vocab, 0))
        found.notes.append(
            f"{kind.name}: {per_s:.1f} requests a second arrive in the open loop; {kind.room} adapters fit, "
            f"in {room:,} bytes"
        )
        for number in range(plan.rounds):
            for cell in reversed(cells) if number % 2 else cells:
                if cell.mode not in {it.mode for it in found.checks if not it.passed}:
                    last |= _one(plan, system, cell, number, count, per_s, vocab, found)
    finally:
        system.stop()
    for mode, (load, answers) in last.items():
        found.checks.append(judge.check(HEDDLE, mode, load, answers))


def _base_rate(system: HeddleSystem, jobs: Sequence[Job]) -> float:
    """Requests a second that the base answers to CLIENTS clients."""
    answers = closed(system, Load(jobs, NEW_TOKENS), CLIENTS)
    return len(answers) / max(it.end for it in answers)


def _one(plan: Plan, system: HeddleSystem, cell: Cell, number: int, count: int, per_s: float, vocab: int,
         found: Found) -> dict[str, tuple[Load, list[Answer]]]:  # fmt: skip
    """The answers, by the cell's mode; none where it failed, which is a check that did not pass."""
    names = cell.kind.names(cell.ratio)
    asked = requests(count, names, cell.popularity, vocab, number + 1)
    load = Load(asked, NEW_TOKENS, poisson(count, per_s, number) if cell.loop == OPEN else None)
    # those that are asked for first are there when it begins
    early = list(dict.fromkeys(it.adapter for it in asked))[: cell.kind.room]
    warm = Load([Job(job.prompt, name) for job, name in zip(asked, early, strict=False)], 1)
    ask: Callable[[], list[Answer]] = (
        (lambda: system.run(load)) if cell.loop == OPEN else (lambda: closed(system, load, CLIENTS))
    )

    def take() -> tuple[Figures, list[Answer]]:
        system.run(warm)
        cpu, loads = system.cpu_seconds(), heddle.loads(system)
        answers = ask()
        return told(load, answers, system.cpu_seconds() - cpu, heddle.loads(system) - loads), answers

    try:
        (taken, answers), foreign = quietly(take, plan.repeats)
    except (Refused, OSError, EOFError, TimeoutError) as error:
        found.checks.append(Check(HEDDLE, cell.mode, False, note=worded(error, plan.context.rooms)))
        return {}
    taken["hits, %"] = 100 * hit_share([it.adapter or "" for it in asked], cell.kind.room)
    found.samples.append(Sample(HEDDLE, cell.mode, number, taken, foreign))
    say(f"  round {number} {cell.mode:28} p50 {taken[P50]:.0f} p99 {taken[P99]:.0f} ms, {foreign:.2f} cores foreign")
    return {cell.mode: (load, answers)}


def told(load: Load, answers: Sequence[Answer], cpu_seconds: float, loads: float) -> Figures:
    """Of a cell. In the open loop a request begins when it is due, even if our client was late to send it."""
    begun = [it.sent if load.arrivals is None else load.due(index) for index, it in enumerate(answers)]
    first = [1e3 * (it.times[0] - at) for it, at in zip(answers, begun, strict=True)]
    seconds = max(it.end for it in answers) - min(it.sent for it in answers)
    whole = figures(answers, cpu_seconds, math.nan)
    return {P50: percentile(first, 0.5), P90: percentile(first, 0.9), P99: percentile(first, 0.99),
            "tok/s": whole["tok/s"], "tok/CPU s": whole["tok/CPU s"], heddle.LOADS_PER_S: loads / seconds,
            "loads/request, %": 100 * loads / len(answers)}  # fmt: skip


def growth(found: Found, kinds: Sequence[Kind]) -> list[Row]:
    """By how much the time grows; no row where an answer was wrong."""
    rows: list[Row] = []
    for kind, loop, popularity, unit in product(kinds, LOOPS, POPULARITIES, (P50, P99)):
        first, *more = (Cell(kind, loop, popularity, ratio) for ratio in RATIOS)
        if not all(is_sound(found.checks, HEDDLE, it.mode) for it in (first, *more)):
            continue
        over = {it.ratio: ratios(found.samples, (HEDDLE, it.mode), (HEDDLE, first.mode), unit) for it in more}
        grown = {f"{ratio}x": spread(*it) for ratio, it in over.items()}
        rows.append({"adapters and load": first.line, "": unit, **grown})
    return rows


def lines(found: Found, kind: Kind, loop: str) -> list[curves.Line]:
    """Median and 99th percentile of each popularity; none where a check failed."""
    made = []
    for popularity, unit in product(POPULARITIES, (P50, P99)):
        modes = [Cell(kind, loop, popularity, ratio).mode for ratio in RATIOS]
        made.append(curves.line(found, f"{popularity}, {unit.split()[1]}", modes, unit))
    return made
