"""Adapters that come and go: what neighbours feel, what they take, and how long one waits. `make bench-adapters`, or:

    python -m benchmarks.adapters                              # all sections; page, pictures and figures into results/
    python -m benchmarks.adapters --only neighbours,ttft       # some
    python -m benchmarks.adapters --quick --no-write           # does it work? Its figures mean nothing

A figure counts only if all answers beside it were right.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.adapters import fairness, neighbours, report, sizes, ttft
from benchmarks.adapters.found import HEDDLE, Found
from benchmarks.adapters.goals import GOALS
from benchmarks.adapters.models import AdapterModels
from benchmarks.peers.goals import outcome
from benchmarks.peers.load import Check
from benchmarks.peers.machine import describe
from benchmarks.peers.openai_stream import Refused
from benchmarks.peers.rounds import Context, Plan, say, worded
from benchmarks.peers.systems.system import DidNotStart
from benchmarks.served import ROOT

RESULTS = ROOT / "benchmarks" / "results"
SECTIONS: dict[str, ModuleType] = {"neighbours": neighbours, "bytes": sizes, "ttft": ttft, "fairness": fairness}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="heddle-adapters-") as made:
        directory = Path(made)
        context = Context(directory, AdapterModels(options.models or directory))
        rounds = 1 if options.quick else options.rounds
        plan = Plan(context, rounds, ["heddle"], options.threads, options.quick, 0 if options.quick else 1)
        found = {name: _section(plan, name) for name in options.only}
    head = _head(options, context, rounds)
    name = f"{head['date']}-{options.name}-adapters"
    texts = {picture: text for it in found.values() for picture, text in it.pictures.items() if text}
    files = {picture: f"{name}-{picture}.svg" for picture in texts}
    page = report.page(head, found, SECTIONS, files)
    if options.no_write:
        print(page)
    else:
        options.results.mkdir(parents=True, exist_ok=True)
        for picture, file in files.items():
            (options.results / file).write_text(texts[picture], encoding="utf-8")
        (options.results / f"{name}.md").write_text(page, encoding="utf-8")
        (options.results / f"{name}.json").write_text(_json(head, found), encoding="utf-8")
        say(f"written: {options.results / name}.md")
    return int(any(not it.passed for its in found.values() for it in its.checks))


def _section(plan: Plan, name: str) -> Found:
    """One that fails is told of, as a check that did not pass, beside what it had found; the others go on."""
    begun, found = time.monotonic(), Found()
    say(f"{name}: {SECTIONS[name].TITLE}")
    try:
        SECTIONS[name].run(plan, found)
    except (RuntimeError, OSError, AssertionError, ValueError, LookupError, DidNotStart, Refused) as error:
        note = f"the section failed: {worded(error, plan.context.rooms)}"
        found.checks.append(Check(HEDDLE, name, False, note=note))
        found.notes.append(note)
        say(note)
    plan.context.took[name] = round(time.monotonic() - begun)
    say(f"{name} took {plan.context.took[name]} s")
    return found


def _head(options: argparse.Namespace, context: Context, rounds: int) -> dict[str, object]:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=9"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return {
        "date": date.today().isoformat(),
        "machine": options.machine,
        "command": _command(options),
        "commit": commit,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("heddle-server", "torch", "transformers")},
        "rounds": rounds,
        "quick": options.quick,
        "threads": options.threads,
        "took_s": context.took,
    }


def _command(options: argparse.Namespace) -> str:
    """Without places, which are nobody else's."""
    only = [] if options.only == list(SECTIONS) else ["--only", ",".join(options.only)]
    return " ".join(["python -m benchmarks.adapters", *only, *(["--quick"] if options.quick else []), "--rounds",
                     str(options.rounds)])  # fmt: skip


def _json(head: Mapping[str, object], found: Mapping[str, Found]) -> str:
    goals = [{**asdict(goal), "value": told.value, "verdict": told.verdict.strip("*")} for goal in GOALS
             if goal.suite in found
             for told in [outcome(goal, found[goal.suite].samples, found[goal.suite].checks)]]  # fmt: skip
    sections = {name: {key: it for key, it in asdict(its).items() if key not in ("pictures", "floors")}
                for name, its in found.items()}  # fmt: skip
    return json.dumps({**head, "goals": goals, "sections": sections}, indent=1) + "\n"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--only", type=lambda it: it.split(","), default=list(SECTIONS), metavar="A,B",
                        help=f"sections: {', '.join(SECTIONS)}")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, few and short requests: to see that it works")
    parser.add_argument("--threads", type=int, default=cores, help="of the engine (%(default)s)")
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep the models that are made")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--name", default=f"{cores}cores", help="of the machine, in file names")
    parser.add_argument("--machine", default=describe(), help="in words")
    parser.add_argument("--no-write", action="store_true", help="print the page instead")
    options = parser.parse_args(arguments)
    if unknown := [it for it in options.only if it not in SECTIONS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
