"""What systems are asked, what they answer, and the figures that come of it. Nothing here knows a system."""

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.workload import Job, make_jobs

Figures = dict[str, float]  # unit -> value


@dataclass(frozen=True)
class Load:
    """Requests with the greedy tokens that each asks for. `arrivals`: seconds from the start; None: all at once."""

    jobs: Sequence[Job]
    new_tokens: int = 64
    arrivals: Sequence[float] | None = None

    def due(self, index: int) -> float:
        return self.arrivals[index] if self.arrivals is not None else 0.0


@dataclass(frozen=True)
class Answer:
    """`times`: seconds from the run's start, of each token's arrival; empty where a system does not tell."""

    tokens: Sequence[int]
    sent: float
    end: float
    times: Sequence[float] = ()


@dataclass
class Sample:
    """The figures of one mode of one system in one round. `foreign`: cores that other processes kept busy meanwhile."""

    system: str
    mode: str
    round: int
    figures: Figures
    foreign: float = 0.0
    note: str = ""


@dataclass
class Check:
    """Whether a mode's answers are those of Transformers with merged weights. `share`: of the tokens compared that are
    the most likely one; `gap`: the largest distance of another one to it, as a part of the largest logit."""

    system: str
    mode: str
    passed: bool
    share: float | None = None
    tokens: int = 0
    gap: float = 0.0
    first: str = ""  # divergence: where, and its gap
    note: str = ""


@dataclass
class Taken:
    """What a suite has found."""

    samples: list[Sample] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    floors: list[dict[str, float | str]] = field(default_factory=list)


def jobs(count: int, adapters: Sequence[str | None], vocab: int, seed: int, uniform: bool = False) -> list[Job]:
    """Workload A's prompts; adapters in Zipf's proportions, or in turns, which for a fixed count is the uniform draw
    without its luck."""
    made = make_jobs(count, adapters, vocab, seed)
    if not uniform:
        return made
    return [Job(job.prompt, adapters[(index + seed) % len(adapters)]) for index, job in enumerate(made)]


def poisson(count: int, per_s: float, seed: int) -> list[float]:
    """Arrivals in seconds, the first at once."""
    rng, at, times = random.Random(f"arrivals {seed}"), 0.0, []
    for _ in range(count):
        times.append(at)
        at += rng.expovariate(per_s)
    return times


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def figures(answers: Sequence[Answer], cpu_seconds: float, rss_mib: float) -> Figures:
    """Speed from the first request's start to the last one's end; latencies in milliseconds where times are told."""
    tokens = sum(len(it.tokens) for it in answers)
    seconds = max(it.end for it in answers) - min(it.sent for it in answers)
    found = {
        "tok/s": tokens / seconds,
        "tok/CPU s": tokens / cpu_seconds if cpu_seconds else math.nan,
        "RSS MiB": rss_mib,
    }
    timed = [it for it in answers if it.times]
    if len(timed) == len(answers):
        first = [1e3 * (it.times[0] - it.sent) for it in timed]
        found |= {"TTFT p50 ms": statistics.median(first), "TTFT p99 ms": percentile(first, 0.99)}
    if gaps := [1e3 * (after - before) for it in timed for before, after in zip(it.times, it.times[1:], strict=False)]:
        each = [1e3 * (it.times[-1] - it.times[0]) / (len(it.times) - 1) for it in timed if len(it.times) > 1]
        found |= {"TPOT p50 ms": statistics.median(each), "ITL p50 ms": statistics.median(gaps),
                  "ITL p99 ms": percentile(gaps, 0.99)}  # fmt: skip
    return {unit: value for unit, value in found.items() if not math.isnan(value)}
