"""Heddle beside its peers: one command, one page. `make bench-peers`, or:

    python -m benchmarks.peers                                     # all suites, all peers; the page into results/
    python -m benchmarks.peers --only a,e --peers heddle,vllm      # some
    python -m benchmarks.peers --quick --no-write                  # does it work? Its figures mean nothing

Each peer is installed in an environment of its own (--rooms), where it stays. One that cannot be installed or started
is on the page with the reason. A figure counts only if its answers are those of Transformers (correctness.py).
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
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.peers import plots, report
from benchmarks.peers.environments import default_rooms
from benchmarks.peers.goals import GOALS, outcome
from benchmarks.peers.load import Taken
from benchmarks.peers.machine import describe
from benchmarks.peers.models import Models
from benchmarks.peers.rounds import Context, Plan, say, worded
from benchmarks.peers.suites import SUITES
from benchmarks.peers.systems import PEERS, SYSTEMS
from benchmarks.served import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(options.threads)
    disable_progress_bar()
    systems = [name for peer in options.peers for name in PEERS[peer]]
    with tempfile.TemporaryDirectory(prefix="heddle-peers-") as made:
        context = Context(options.rooms.resolve(), Models(options.models or Path(made)))
        plan = Plan(context, options.rounds, systems, options.threads, options.quick, 0 if options.quick else 1)
        found = _run(plan, options.only)
    head = _head(options, context)
    texts = {letter: plots.bars(SUITES[letter].TITLE, unit, found[letter].samples, found[letter].checks)
             for letter, unit in plots.PLOTTED.items() if letter in found}  # fmt: skip
    name = f"{head['date']}-{options.name}"
    pictures = {letter: f"{name}-{letter}.svg" for letter, text in texts.items() if text}
    page = report.page(head, found, context.absent, pictures)
    if options.no_write:
        print(page)
    else:
        options.results.mkdir(parents=True, exist_ok=True)
        for letter, file in pictures.items():
            (options.results / file).write_text(texts[letter], encoding="utf-8")
        (options.results / f"{name}.md").write_text(page, encoding="utf-8")
        (options.results / f"{name}.json").write_text(_json(head, found, context.absent), encoding="utf-8")
        say(f"written: {options.results / name}.md")
    is_wrong = any(it.system == "heddle" and not it.passed for taken in found.values() for it in taken.checks)
    return int(is_wrong or "heddle" in context.absent)


def _run(plan: Plan, letters: Sequence[str]) -> dict[str, Taken]:
    """A suite that fails is told of, and the others go on."""
    found: dict[str, Taken] = {}
    for letter in letters:
        begun = time.monotonic()
        say(f"({letter}) {SUITES[letter].TITLE}")
        try:
            found[letter] = SUITES[letter].run(plan)
        except (RuntimeError, OSError, AssertionError, ValueError) as error:
            found[letter] = Taken(notes=[f"the suite failed: {worded(error, plan.context.rooms)}"])
            say(found[letter].notes[0])
        plan.context.took[letter] = round(time.monotonic() - begun)
        say(f"({letter}) took {plan.context.took[letter]} s")
    return found


def _head(options: argparse.Namespace, context: Context) -> dict[str, object]:
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=9"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    return {
        "date": date.today().isoformat(),
        "machine": options.machine,
        "command": _command(options),
        "commit": commit,
        "python": platform.python_version(),
        "rounds": options.rounds,
        "threads": options.threads,
        "took_s": context.took,
        "versions": context.versions,
        "settings": {name: it.settings for name, it in SYSTEMS.items()},
        "starts_s": {name: [round(it, 1) for it in times] for name, times in context.starts.items()},
    }


def _command(options: argparse.Namespace) -> str:
    """Without places, which are nobody else's."""
    only = [] if options.only == list(SUITES) else ["--only", ",".join(options.only)]
    peers = [] if options.peers == list(PEERS) else ["--peers", ",".join(options.peers)]
    quick = ["--quick"] if options.quick else []
    return " ".join(["python -m benchmarks.peers", *only, *peers, "--rounds", str(options.rounds), *quick])


def _json(head: Mapping[str, object], found: Mapping[str, Taken], absent: Mapping[str, str]) -> str:
    goals = [{**asdict(goal), "value": told.value, "verdict": told.verdict.strip("*")} for goal in GOALS
             if goal.suite in found
             for told in [outcome(goal, found[goal.suite].samples, found[goal.suite].checks)]]  # fmt: skip
    suites = {letter: asdict(taken) for letter, taken in found.items()}
    return json.dumps({**head, "did_not_run": absent, "goals": goals, "suites": suites}, indent=1) + "\n"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--only", type=lambda it: it.split(","), default=list(SUITES), metavar="A,B", help="suites, by letter"
    )
    parser.add_argument(
        "--peers", type=lambda it: it.split(","), default=list(PEERS), metavar="X,Y", help=", ".join(PEERS)
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few and short requests: to see that it works")
    parser.add_argument("--threads", type=int, default=cores, help="of each system (%(default)s)")
    parser.add_argument("--rooms", type=Path, default=default_rooms(), metavar="DIR",
                        help="where peers are installed (%(default)s)")  # fmt: skip
    parser.add_argument("--models", type=Path, metavar="DIR", help="keep the models that are made")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--name", default=f"{cores}cores", help="of the machine, in file names")
    parser.add_argument("--machine", default=describe(), help="in words")
    parser.add_argument("--no-write", action="store_true", help="print the page instead")
    options = parser.parse_args(arguments)
    for given, known in ((options.only, SUITES), (options.peers, PEERS)):
        if unknown := [it for it in given if it not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
