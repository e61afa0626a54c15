"""Systems take turns at the same requests: in every round each of them once, every other round backwards.

What other processes did meanwhile is measured around each turn. One beside which they kept more than FOREIGN cores busy
is taken once more, and the quieter of the two is kept, with its mark.
"""

import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import psutil

from benchmarks.peers.correctness import Judge
from benchmarks.peers.environments import NotInstalled
from benchmarks.peers.load import Answer, Load, Sample, Taken, figures
from benchmarks.peers.models import Models
from benchmarks.peers.openai_stream import Refused
from benchmarks.peers.systems import create
from benchmarks.peers.systems.system import DidNotStart, Served, System
from benchmarks.served import ROOT, OtherWork

FOREIGN = 0.25  # cores


Loads = Callable[[int], Load]


@dataclass(frozen=True)
class Plan:
    """What all suites are told."""

    context: "Context"
    rounds: int
    systems: Sequence[str]
    threads: int
    quick: bool
    repeats: int = 1

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@dataclass
class Context:
    """What is kept over the suites. `absent`: system -> why it did not run."""

    rooms: Path
    models: Models
    absent: dict[str, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    starts: dict[str, list[float]] = field(default_factory=dict)
    took: dict[str, int] = field(default_factory=dict)  # suite -> seconds


@dataclass(frozen=True)
class Turn:
    """`load`: of a round, the same for all systems of a mode. `rounds`: in how many it is taken, at most; `few`: the
    same for systems that take long."""

    mode: str
    load: Loads
    needs: frozenset[str]
    rounds: int = 99
    only: Sequence[str] = ()  # systems; all that can, where empty
    few: Mapping[str, int] = field(default_factory=dict)

    def rounds_of(self, system: str) -> int:
        return min(self.rounds, self.few.get(system, self.rounds))


def start_all(
    plan: Plan, served: Served, needs: Iterable[str], own: Mapping[str, Served] = MappingProxyType({})
) -> dict[str, System]:
    """Those of the plan's systems that can all of `needs`; who does not start is noted, and why."""
    running: dict[str, System] = {}
    for name in plan.systems:
        system = create(name, plan.context.rooms)
        if name in plan.context.absent or not set(needs) <= system.can:
            continue
        say(f"starting {name} …")
        try:
            system.start(own.get(name, served))
        except (NotInstalled, DidNotStart, OSError) as error:
            plan.context.absent[name] = worded(error, plan.context.rooms)
            say(f"{name}: {plan.context.absent[name]}")
            continue
        plan.context.versions[name] = system.versions
        plan.context.starts.setdefault(name, []).append(system.start_s)
        running[name] = system
    return running


def stop_all(running: dict[str, System]) -> None:
    for system in running.values():
        system.stop()


def interleave(plan: Plan, running: dict[str, System], turns: Sequence[Turn], judge: Judge | None) -> Taken:
    """Warm-up, rounds, and then what the last round's answers are worth."""
    pairs = [(system, turn) for turn in turns for system in running.values() if _takes_part(system, turn)]
    taken, last, failed = Taken(), {}, set()
    for number in range(-1, plan.rounds):
        for system, turn in reversed(pairs) if number % 2 else pairs:
            if (system.name, turn.mode) in failed or number >= turn.rounds_of(system.name):
                continue
            load = turn.load(number)
            if number < 0:  # warm: adapters in memory, kernels chosen
                load = Load(load.jobs[: max(8, len(load.jobs) // 8)], min(8, load.new_tokens))
            try:
                sample, answers = _measure(plan, system, turn.mode, number, load)
            except (Refused, DidNotStart, OSError, EOFError, TimeoutError) as error:
                failed.add((system.name, turn.mode))
                taken.notes.append(f"{system.name}, {turn.mode}: {worded(error, plan.context.rooms)}")
                say(taken.notes[-1])
                continue
            if number >= 0:
                taken.samples.append(sample)
                last[system.name, turn.mode] = load, answers
    if judge is not None:
        for (name, mode), (load, answers) in last.items():
            taken.checks.append(judge.check(name, mode, load, answers))
            say(f"  {name} {mode}: {'right' if taken.checks[-1].passed else 'WRONG'} {taken.checks[-1]}")
    return taken


def _takes_part(system: System, turn: Turn) -> bool:
    return turn.needs <= system.can and (not turn.only or system.name in turn.only)


def _measure(plan: Plan, system: System, mode: str, number: int, load: Load) -> tuple[Sample, list[Answer]]:
    best: tuple[Sample, list[Answer]] | None = None
    for _ in range(1 + plan.repeats if number >= 0 else 1):
        before = system.cpu_seconds()
        with OtherWork() as others:
            answers = system.run(load)
        foreign = others.share * (psutil.cpu_count() or 1)
        found = figures(answers, system.cpu_seconds() - before, system.rss_mib())
        sample = Sample(system.name, mode, number, found, round(foreign, 2))
        if number >= 0:
            say(f"  round {number} {system.name:13} {mode:24} {found['tok/s']:7.1f} tok/s "
                f"{found.get('tok/CPU s', 0):7.1f} a CPU second, {foreign:.2f} cores foreign")  # fmt: skip
        if best is None or foreign < best[0].foreign:
            best = sample, answers
        if foreign <= FOREIGN:
            break
    assert best is not None
    return best


def worded(error: Exception, rooms: Path) -> str:
    """For a page that others read: without directories of this machine."""
    text = f"{type(error).__name__}: {error}"
    for place in (rooms, ROOT, tempfile.gettempdir(), Path.home()):  # the first may lie in the others
        text = text.replace(str(place), "…")
    return text


def say(line: str) -> None:
    with suppress(BrokenPipeError):
        print(line, file=sys.stderr, flush=True)
