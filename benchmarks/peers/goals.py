"""What the project has set itself, and how each goal is read off what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.peers.load import Check, Sample
from benchmarks.peers.suites import memory, mixture, neighbours, overhead
from benchmarks.peers.summary import median_of, ratios

Key = tuple[str, str]  # system, mode


@dataclass(frozen=True)
class Goal:
    """`of` alone: the median of its figure; with `over`: the median of the rounds' ratios."""

    suite: str
    says: str
    of: Key
    unit: str
    bound: float
    over: Key | None = None
    at_most: bool = False


@dataclass(frozen=True)
class Outcome:
    goal: Goal
    value: float | None
    why: str = ""  # there is no value

    @property
    def verdict(self) -> str:
        if self.value is None:
            return self.why
        met = self.value <= self.goal.bound if self.goal.at_most else self.value >= self.goal.bound
        return "met" if met else "**not met**"


_BASE, _MIXED, _SPEED = ("heddle", "base"), ("heddle", "8 mixed"), "tok/s"
_ITL50, _ITL99 = "ITL p50 ms", "ITL p99 ms"
_FLOOR = mixture.BEYOND
GOALS = (
    Goal("a", "base over vLLM without LoRA", _BASE, _SPEED, 1.05, ("vllm-off", "base")),
    Goal("a", "base over OpenVINO", _BASE, _SPEED, 0.85, ("openvino", "base")),
    Goal("a", "8 mixed over its own base", _MIXED, _SPEED, 0.93, _BASE),
    Goal("a", "8 mixed over vLLM's", _MIXED, _SPEED, 4.3, ("vllm", "8 mixed")),
    Goal("a", "8 mixed over PEFT's", _MIXED, _SPEED, 2.7, ("transformers", "8 mixed")),
    Goal("a", "8 mixed over OpenVINO, grouped by adapter", _MIXED, _SPEED, 1.4, ("openvino", "8 grouped by adapter")),
    Goal("b", "128 in equal parts over 8", ("heddle", "128, uniform"), _SPEED, 0.9, ("heddle", "8, Zipf")),
    Goal("c", "8 ESFT over base, beyond the floor", ("heddle", "8 ESFT"), _FLOOR, 0.92, _BASE),
    Goal("c", "8 LoRA over base", ("heddle", "8 LoRA on attention"), _SPEED, 0.92, _BASE),
    Goal("c", "base over generate", _BASE, _SPEED, 2.0, ("transformers", "base")),
    Goal("e", "8 streams, quiet: ITL p50, ms", ("heddle", neighbours.QUIET), _ITL50, 15.0, at_most=True),
    Goal("e", "8 streams, 4k prompts arriving: ITL p99, ms", ("heddle", neighbours.LONG), _ITL99, 60.0, at_most=True),
    Goal("g", "front, us a streamed token (completions)", ("heddle", "front, /v1/completions"), overhead.TOKEN, 60.0,
         at_most=True),
    Goal("g", "front, us a streamed token (chat)", ("heddle", "front, /v1/chat/completions"), overhead.TOKEN, 60.0,
         at_most=True),
    Goal("i", "RSS beyond weights, KV in use and adapters, MiB", ("heddle", memory.END), memory.BEYOND, 450.0,
         at_most=True),
    Goal("i", "growth from run to run, MiB (of its last half; noise: 8)", ("heddle", memory.END), memory.GROWTH, 8.0,
         at_most=True),
)  # fmt: skip


def outcome(goal: Goal, samples: Sequence[Sample], checks: Sequence[Check]) -> Outcome:
    """Of a suite's findings. A figure whose check failed, or that has none, makes none."""
    for key in (goal.of, goal.over):
        if key is None:
            continue
        its = [it for it in checks if (it.system, it.mode) == key]
        if not any((it.system, it.mode) == key and goal.unit in it.figures for it in samples):
            return Outcome(goal, None, f"not measured: {key[0]}, {key[1]}")
        if not its or not all(it.passed for it in its):
            return Outcome(goal, None, f"{key[0]}, {key[1]}: failed check")
    if goal.over is None:
        return Outcome(goal, median_of(samples, *goal.of, goal.unit))
    return Outcome(goal, ratios(samples, goal.of, goal.over, goal.unit)[0])
