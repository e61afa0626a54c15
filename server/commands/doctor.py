"""`heddle doctor`: what this machine has for serving, and what it lacks."""

import argparse
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from adapters_store.errors import clean
from server.commands.tables import print_table
from server.engine_child import SPIN_COUNT
from server.errors import ConfigError
from server.kernels_name import check_kernels_are_ours

if TYPE_CHECKING:
    from server.diagnosis import Base, Fact


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "doctor",
        help="what this machine has for serving, and what it lacks",
        description="Print versions, the CPU, and the forms in which products are fastest here. With MODEL_DIR, also "
        "whether that base is served and what is chosen for its matrices: it is loaded, and what was not measured "
        "before is measured. Needs no server.",
    )
    command.set_defaults(run=run)
    command.add_argument("model_dir", nargs="?", metavar="MODEL_DIR", help="a Transformers causal language model")
    command.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of its weights")
    command.add_argument("--threads", type=int, default=0, metavar="N", help="as of heddle serve; 0: the cores")


def run(options: argparse.Namespace) -> int:
    if options.threads < 0:
        raise ConfigError(f"threads must be at least 0, not {options.threads}")
    check_kernels_are_ours()
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # products are measured as the engine computes them
    from server import diagnosis  # seconds of imports

    threads = options.threads or len(os.sched_getaffinity(0))
    lacking = _tell(diagnosis.facts(threads))
    if options.model_dir is not None:
        print()
        base = diagnosis.base(options.model_dir, options.dtype, threads)
        lacking += _tell(base.facts)
        _tell_linears(base)
    rows = list(diagnosis.times(threads))
    if rows:
        print(f"\nMicroseconds of a product, measured with {threads} threads, by number of rows:")
        header = ("shape", "form", *diagnosis.ROWS, "chosen")
        print_table(header, [(row.shape, row.form, *row.times, row.choice) for row in rows])
    if lacking:
        print("\nTo mend:")
        for fact in lacking:
            print(f"  {clean(fact.what)}: {clean(fact.remedy or '')}")
    return 0


def _tell(facts: "Iterable[Fact]") -> "list[Fact]":
    """Returns those that something is missing of."""
    told = list(facts)
    for fact in told:
        print(f"{'!' if fact.remedy else ' '} {fact.what:<18}{clean(fact.value)}")
    return [fact for fact in told if fact.remedy]


def _tell_linears(base: "Base") -> None:
    print()
    print_table(("linears", "shape", "form", "copies", ""), base.linears)
