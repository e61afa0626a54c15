"""Output tokens over HTTP, a second and a CPU second, against the number of LoRA adapters in the batch.

    python -m benchmarks.adapter_counts --machine "2 virtual cores of …"     # rewrites results/adapter_counts.json
    python -m benchmarks.adapter_counts --rounds 1 --counts 1 8 --no-write

One server over the random Llama of the other benchmarks; 64 requests at once, which name n adapters equally often, so
that with 64 every request has its own. In a round all counts are asked for prompts of the same lengths, the base alone
first and last; machines are noisy, so what counts is each figure over the mean of those two. Every other round goes
through the counts backwards. CPU seconds are the server's, both processes: beside other work they are steadier than
time is. The picture in README is drawn from the result: python -m docs.pictures.
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.served import NEW_TOKENS, Heddle, OtherWork, Speed
from benchmarks.workload import Job, make_llama

RESULTS = Path(__file__).resolve().parent / "results" / "adapter_counts.json"
COUNTS = (1, 2, 4, 8, 16, 32, 64)
MODEL = "random Llama of 36 million parameters, LoRA on all linears, ranks 8 and 16 in turns, float32"
VOCAB = 8192
UNITS = Speed._fields


def make_round(count: int, adapters: Sequence[str], index: int, turn: int) -> list[Job]:
    """Prompts of 64 to 256 random ids; no adapters: for the base.

    Their lengths are the round's (`index`), their ids those of its `turn`: an adapter that is asked again must not find
    the prompt in its prefix cache.
    """
    lengths, ids = random.Random(f"lengths {index}"), random.Random(f"ids {index} {turn}")
    return [
        Job(
            [ids.randrange(4, VOCAB) for _ in range(lengths.randint(64, 256))],
            adapters[place % len(adapters)] if adapters else None,
        )
        for place in range(count)
    ]


def measure(heddle: Heddle, adapters: list[str], counts: list[int], rounds: int, requests: int) -> list[dict[str, Any]]:
    """Of each round: the speeds of the base (twice) and of each count, and what other work took of the machine."""
    heddle.run(make_round(max(requests, len(adapters)), adapters, -1, 0))  # all of them into memory
    heddle.run(make_round(requests, [], -1, 1))
    told = []
    for index in range(rounds):
        order = [0, *(reversed(counts) if index % 2 else counts), 0]
        speeds: dict[int, list[Speed]] = {}
        with OtherWork() as others:
            for turn, count in enumerate(order):
                speed = heddle.measure(make_round(requests, adapters[:count], index, turn))
                speeds.setdefault(count, []).append(speed)
                print(f"round {index} {count:3} adapters {speed.tokens_per_s:8.1f} tokens/s, "
                      f"{speed.tokens_per_cpu_s:8.1f} a CPU second", flush=True)  # fmt: skip
        print(f"round {index}: {others.share:.0%} of the machine busy with other work", flush=True)
        told.append(
            {
                unit: {
                    "base": [round(getattr(speed, unit), 1) for speed in speeds[0]],
                    "adapters": {str(count): round(getattr(speeds[count][0], unit), 1) for count in counts},
                }
                for unit in UNITS
            }
            | {"other_work": round(others.share, 3)}
        )
    return told


def summary(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By count (0: the base) and unit: median, lowest and highest, of the rounds and of their ratios to the base."""
    counts = list(rounds[0][UNITS[0]]["adapters"])
    points: list[dict[str, Any]] = [{"adapters": int(count)} for count in ("0", *counts)]
    for unit in UNITS:
        bases = [statistics.mean(it[unit]["base"]) for it in rounds]
        points[0][unit] = _spread(bases, 1)
        for count, point in zip(counts, points[1:], strict=True):
            speeds = [it[unit]["adapters"][count] for it in rounds]
            point[unit] = _spread(speeds, 1)
            ratios = [speed / base for speed, base in zip(speeds, bases, strict=True)]
            point.setdefault("of_base", {})[unit] = _spread(ratios, 3)
    return points


def _spread(values: list[float], digits: int) -> dict[str, float]:
    named = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {name: round(value, digits) for name, value in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--machine", default=f"{cores} cores, {platform.machine()}", help="in words, for the result")
    parser.add_argument("--threads", type=int, default=cores, help="of the engine")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--no-write", action="store_true", help=f"leave {RESULTS.name} alone")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        make_llama(directory, max(options.counts))
        adapters = [f"lora-{index}" for index in range(max(options.counts))]
        heddle = Heddle(directory, options=("--threads", str(options.threads)))
        try:
            rounds = measure(heddle, adapters, options.counts, options.rounds, options.requests)
        finally:
            heddle.stop()
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    result = {
        "date": date.today().isoformat(),
        "machine": options.machine,
        "engine_threads": options.threads,
        "versions": {"python": platform.python_version(), **packages},
        "model": MODEL,
        "requests": options.requests,
        "prompt_tokens": [64, 256],
        "new_tokens": NEW_TOKENS,
        "points": summary(rounds),
        "rounds": rounds,
    }
    print(json.dumps(result["points"], indent=1))
    if not options.no_write:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
