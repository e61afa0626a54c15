"""Is this checkout slower than another commit? CPU seconds an output token of both servers, in pairs.

    python -m benchmarks.against REF               (make bench-against REF=main~3)

Both servers run side by side and take turns at the same requests, base and adapters mixed, so that what disturbs the
machine disturbs both. For each workload: the median of old/new (over 1: this checkout is faster) and the 95 % interval
of its mean. Exit status 1 where a whole interval lies below 0.98.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.served import ROOT, Heddle
from benchmarks.workload import copy_demo, make_jobs, make_llama

MIN_PAIRS = 8
LEAST = 0.98
# two-sided 95 % quantiles of Student's t, by degrees of freedom from 1 on
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
       2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045)  # fmt: skip


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % interval of the geometric mean, by Student's t over logarithms."""
    logs = [math.log(ratio) for ratio in ratios]
    freedom = len(logs) - 1
    quantile = T95[freedom - 1] if freedom <= len(T95) else T95[-1]
    middle, half = statistics.mean(logs), quantile * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle - half), math.exp(middle + half)


def measure(
    name: str, old: Heddle, new: Heddle, adapters: list[str], vocab: int, pairs: int, requests: int
) -> list[float]:
    """old/new of CPU seconds a token, pair by pair; every other pair begins with the new one."""
    ratios: list[float] = []
    for pair in range(-1, pairs):
        jobs = make_jobs(requests, [None, *adapters], vocab, seed=pair)
        order = (old, new) if pair % 2 else (new, old)
        costs = {server: server.cpu_seconds_per_token(jobs) for server in order}
        if pair < 0:  # adapters come into memory
            continue
        ratios.append(costs[old] / costs[new])
        print(f"{name} pair {pair}: old {costs[old] * 1e3:.3f} ms, new {costs[new] * 1e3:.3f} ms of CPU a token, "
              f"old/new {ratios[-1]:.3f}", flush=True)  # fmt: skip
    return ratios


@contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """The commit's files, in a place of their own."""
    with tempfile.TemporaryDirectory(prefix="heddle-against-") as parent:
        directory = Path(parent) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(directory), ref], check=True)
        try:
            yield directory
        finally:
            subprocess.run([*git, "remove", "--force", str(directory)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ref", help="the commit to compare with")
    parser.add_argument("--only", choices=("llama", "demo"))
    parser.add_argument("--pairs", type=int, default=MIN_PAIRS)
    parser.add_argument("--requests", type=int, default=64)
    options = parser.parse_args()
    if options.pairs < MIN_PAIRS:
        parser.error(f"--pairs {options.pairs}: at least {MIN_PAIRS}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    is_slower = False
    with checkout(options.ref) as root:
        for name, make in {"llama": make_llama, "demo": copy_demo}.items():
            if options.only not in (None, name):
                continue
            with tempfile.TemporaryDirectory() as made:
                directory = Path(made)
                make(directory)
                adapters = sorted(path.name for path in (directory / "adapters").iterdir())
                vocab = json.loads((directory / "base" / "config.json").read_text())["vocab_size"]
                old = new = None
                try:
                    old, new = Heddle(directory, root), Heddle(directory)
                    ratios = measure(name, old, new, adapters, vocab, options.pairs, options.requests)
                finally:
                    for server in (old, new):
                        if server is not None:
                            server.stop()
            low, high = interval(ratios)
            is_slower |= high < LEAST
            print(f"{name}: old/new {statistics.median(ratios):.3f}, 95 % interval {low:.3f} to {high:.3f}"
                  f"{': slower' if high < LEAST else ''}", flush=True)  # fmt: skip
    return int(is_slower)


if __name__ == "__main__":
    sys.exit(main())
