"""Every kernel against its reference, as it is and under compute-sanitizer."""

import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator

import torch

from benchmarks.gpu.cases import Case, Draw, cases_of, errors_of
from benchmarks.gpu.measure import Bench
from benchmarks.gpu.processes import ROOT
from benchmarks.gpu.report import Row


def correctness(bench: Bench) -> Iterator[Row]:
    """Fresh random inputs in every run. A case that fails is a row, and the others still run."""
    scale, seed = bench.scale, int(time.time())
    dtypes = (torch.float32, torch.bfloat16) if scale.is_cuda else (torch.float32,)
    for dtype in dtypes:
        for op in bench.parts:
            try:
                for case in cases_of(op, Draw(scale, dtype, seed)):
                    yield _compared(case) | {"seed": seed}
            except Exception as error:
                traceback.print_exc()
                yield {"op": op, "case": "making the cases", "failed": f"{type(error).__name__}: {error}"}


def _compared(case: Case) -> Row:
    row: Row = {"op": case.op, "case": case.name, "dtype": str(case.dtype).removeprefix("torch.")}
    try:
        error = errors_of(case)
    except Exception as problem:
        traceback.print_exc()
        return row | {"failed": f"{type(problem).__name__}: {problem}"}
    return row | {"error": error, "allowed": case.tolerance, "ok": error <= case.tolerance}


def memcheck(bench: Bench) -> Iterator[Row]:
    """A process of its own for each op, every tensor an allocation of its own: a step past an end is then seen."""
    program = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + ":/usr/local/cuda/bin")
    command = [sys.executable, "benchmarks/gpu_check.py", "--once", "--toy", "--ops", *bench.parts]
    if program is not None and bench.scale.is_cuda:
        command = [program, "--tool", "memcheck", "--error-exitcode", "99", *command]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    row: Row = {"ops": " ".join(bench.parts), "exit status": done.returncode, "ok": done.returncode == 0}
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-6000:])
    if program is None or not bench.scale.is_cuda:
        why = "compute-sanitizer is not on the PATH" if bench.scale.is_cuda else "there is no GPU"
        yield row | {"skipped": f"{why}; the same command ran without it"}
        return
    summary = re.search(r"ERROR SUMMARY: (\d+) error", done.stdout + done.stderr)
    yield row | {"errors": int(summary[1]) if summary else "it printed no summary"}
