"""One section in this process: `python -m benchmarks.gpu.section NAME --out DIR`, as gpu_check.py starts it."""

import argparse
import faulthandler
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import server.model  # noqa: F401  # before Transformers' model code (server/kernels_name.py)
from benchmarks.gpu.measure import Bench, Scale
from benchmarks.gpu.report import Row, RowFile, as_cell
from benchmarks.gpu.sections import BY_NAME, Section
from kernels.compiled import everywhere


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=BY_NAME)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="*", default=())
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)  # at the limit: where it hangs
    file = RowFile(options.out, options.section)
    for row in rows_of(BY_NAME[options.section], make_bench(options.toy, tuple(options.parts))):
        file.append(row)
        show(row)
    sys.stdout.flush()
    os._exit(0)  # every row is written; what an engine's parts still do in threads is over with the process


def rows_of(section: Section, bench: Bench) -> Iterator[Row]:
    """What cannot go on is the last row."""
    module, _, function = section.entry.partition(":")
    try:
        run: Callable[[Bench], Iterator[Row]] = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
        with everywhere():  # for toy sizes on a CPU; a GPU's tensors go through kernels anyway
            yield from run(bench)
    except Exception as error:
        traceback.print_exc()
        yield {"failed": f"{type(error).__name__}: {error}"}


def make_bench(toy: bool, parts: tuple[str, ...]) -> Bench:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    elif not toy:
        raise SystemExit(f"torch {torch.__version__} sees no GPU; --toy runs without one")
    return Bench(Scale(device, toy), parts)


def show(row: Row) -> None:
    print("  ", "  ".join(f"{key} {as_cell(value)}" for key, value in row.items()), flush=True)


def run_once(ops: tuple[str, ...], toy: bool) -> int:
    """Every case of the ops, compared once and written nowhere."""
    rows = list(rows_of(BY_NAME["kernels"], make_bench(toy, ops)))
    for row in rows:
        show(row)
    return 0 if rows and all(row.get("ok") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
