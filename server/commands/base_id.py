"""`heddle base-id`: which base model a directory holds."""

import argparse
import sys
from pathlib import Path

from adapters_store import base_id


def add_to(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = commands.add_parser(
        "base-id",
        help="print the identity of a base model",
        description="Print the identity of a base model, which a manifest's base_id demands. Reads every byte of its "
        "weights; the same however they are cut into files.",
    )
    command.set_defaults(run=run)
    command.add_argument("model_dir", metavar="MODEL_DIR", type=Path, help="a Transformers causal language model")


def run(options: argparse.Namespace) -> int:
    meter = _Meter()
    try:
        found = base_id.base_id(options.model_dir, meter.show)
    finally:
        meter.end()
    print(found)
    return 0


class _Meter:
    """How much has been read, on a terminal."""

    def __init__(self) -> None:
        self._is_seen = sys.stderr.isatty()
        self._shown = -1  # per cent

    def show(self, done: int, total: int) -> None:
        percent = 100 * done // total if total else 100
        if self._is_seen and percent != self._shown:
            self._shown = percent
            print(f"\r{percent:3d} % of {total / 1e9:,.2f} GB", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._shown >= 0:
            print(file=sys.stderr)
