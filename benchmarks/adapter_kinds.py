"""What a token through each kind of low-rank adapter costs: CPU seconds of a server, beside the base.

    python -m benchmarks.adapter_kinds             # rewrites results/adapter_kinds.md
    python -m benchmarks.adapter_kinds --rounds 1 --no-write

One server over a random mixture, one engine thread; all requests of a turn name adapters of one kind: one adapter, or
eight in equal parts. In a round every kind is asked for prompts of the same lengths, the base first and last; machines
are noisy, so what counts is each figure over the mean of those two. Every other round goes through the kinds backwards.
"""

import argparse
import os
import statistics
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks.adapter_counts import make_round
from benchmarks.served import Heddle
from benchmarks.workload import KINDS, NUM_ADAPTERS, make_mixture

RESULTS = Path(__file__).resolve().parent / "results" / "adapter_kinds.md"
COUNTS = (1, NUM_ADAPTERS)
Turn = tuple[str, int]  # kind, how many adapters
BASE: Turn = ("base", 0)


def measure(heddle: Heddle, rounds: int, requests: int) -> dict[Turn, list[float]]:
    """CPU seconds a token of each kind and count, by round; the base twice a round, averaged."""
    turns = [(kind, count) for kind in KINDS for count in COUNTS]
    for index, kind in enumerate(KINDS):  # all of them into memory
        heddle.run(make_round(NUM_ADAPTERS, _names(kind, NUM_ADAPTERS), -1, index))
    costs: dict[Turn, list[float]] = {}
    for index in range(rounds):
        found: dict[Turn, list[float]] = {}
        order = [BASE, *(reversed(turns) if index % 2 else turns), BASE]
        for place, turn in enumerate(order):
            jobs = make_round(requests, _names(*turn), index, place)
            found.setdefault(turn, []).append(heddle.cpu_seconds_per_token(jobs))
            print(f"round {index} {turn[0]:8} {turn[1]} adapters {found[turn][-1] * 1e3:.3f} ms a token", flush=True)
        for turn, seconds in found.items():
            costs.setdefault(turn, []).append(statistics.mean(seconds))
    return costs


def _names(kind: str, count: int) -> list[str]:
    return [f"{kind}-{index}" for index in range(count)]


def table(costs: dict[Turn, list[float]]) -> str:
    lines = ["| adapters | CPU ms a token | over the base |", "|---|---:|---:|"]
    for turn, seconds in costs.items():
        ratios = [mine / base for mine, base in zip(seconds, costs[BASE], strict=True)]
        name = turn[0] if turn == BASE else f"{turn[0]}, {turn[1]}"
        lines.append(f"| {name} | {statistics.median(seconds) * 1e3:.3f} | {statistics.median(ratios):.2f} "
                     f"({min(ratios):.2f}–{max(ratios):.2f}) |")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default=f"{len(os.sched_getaffinity(0))} cores", help="in words, for the result")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--no-write", action="store_true", help=f"leave {RESULTS.name} alone")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as made:
        make_mixture(Path(made))
        heddle = Heddle(Path(made), options=("--threads", "1"))
        try:
            told = table(measure(heddle, options.rounds, options.requests))
        finally:
            heddle.stop()
    print(told)
    if not options.no_write:
        RESULTS.write_text(
            "# What a token through each kind of adapter costs\n\n"
            f"`python -m benchmarks.adapter_kinds`, {date.today().isoformat()}, {options.machine}, torch "
            f"{version('torch')}, PEFT {version('peft')}, float32. {options.requests} requests at once on a random "
            "mixture (16 experts, 4 a token), rank 8: on attention (LoRA, DoRA), on the router, on all experts' "
            f"matrices. Medians of {options.rounds} rounds; in brackets the lowest and the highest.\n\n{told}\n"
        )


if __name__ == "__main__":
    main()
