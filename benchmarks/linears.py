"""Forms of a linear's matrix side by side: `python -m benchmarks.linears [--threads N]`.

GFLOP/s by the least time of several rounds in which each form has its turn; how far each is from F.linear, of normal
numbers; and how memory grows with the numbers of rows that were seen, with rows padded to few numbers and without.
"""

import argparse
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from kernels.linear import Form, Matrix
from kernels.linear.forms import OneDnnPackedForm, available

SHAPES = ((512, 3072), (512, 1024), (1536, 512), (2048, 5632))  # in, out
ROWS = (1, 8, 16, 32, 64, 256, 512)
_ROUNDS = 7
_SPREAD_BYTES = 40 << 20  # matrices in turn, so that none stays in a core's cache


class Unpadded(OneDnnPackedForm):
    def product(self, x: Tensor, weight: Tensor | None, packed: Tensor | None, bias: Tensor | None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return y


def speeds(dtype: torch.dtype, forms: Sequence[Form], shape: tuple[int, int]) -> dict[str, float]:
    """Prints a row for each number of rows; returns each form's largest difference from the first."""
    count = max(2, min(6, _SPREAD_BYTES // (shape[0] * shape[1] * dtype.itemsize)))
    weights = [torch.randn(shape[1], shape[0]).to(dtype) for _ in range(count)]
    matrices = {form.name: [Matrix(weight, [form]) for weight in weights] for form in forms}
    furthest = {form.name: 0.0 for form in forms}
    for rows in ROWS:
        x = torch.randn(rows, shape[0]).to(dtype)
        y = {form.name: matrices[form.name][0].product(form, x, None).float() for form in forms}
        for name, it in y.items():
            furthest[name] = max(furthest[name], float((it - y[forms[0].name]).abs().max()))
        least = {form.name: float("inf") for form in forms}
        for _ in range(_ROUNDS):
            for form in forms:
                began = time.perf_counter()
                for matrix in matrices[form.name]:
                    matrix.product(form, x, None)
                least[form.name] = min(least[form.name], (time.perf_counter() - began) / count)
        done = 2 * shape[0] * shape[1] * rows / 1e9
        cells = " | ".join(f"{done / least[form.name]:.0f}" for form in forms)
        print(f"| {shape[0]} → {shape[1]} | {rows} | {cells} |", flush=True)
    return furthest


@torch.inference_mode()
def growth(dtype: torch.dtype, form: Form) -> float:
    """MiB of a process that has done nothing else, from 511 numbers of rows that are new to four matrices."""
    shapes = ((512, 3072), (512, 1024), (512, 512), (1536, 512))
    matrices = [Matrix(torch.randn(out, depth).to(dtype), [form]) for depth, out in shapes]
    xs = [torch.randn(512, depth).to(dtype) for depth, _ in shapes]
    before = 0.0
    for rows in (512, *random.Random(3).sample(range(1, 512), 511)):
        for matrix, x in zip(matrices, xs, strict=True):
            matrix.product(form, x[:rows], None)
        before = before or _resident()
    return _resident() - before


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            forms = available(dtype)
            print(f"\n{dtype}, GFLOP/s\n\n| in → out | rows | {' | '.join(form.name for form in forms)} |")
            print(f"|---|---:|{'---:|' * len(forms)}")
            found = [speeds(dtype, forms, shape) for shape in SHAPES]
            for name in found[0]:
                print(f"{name}: at most {max(it[name] for it in found):.1e} from {forms[0].name}")
            for form in (OneDnnPackedForm(), Unpadded()):
                with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                    grown = fresh.submit(growth, dtype, form).result()
                print(f"{type(form).__name__}: +{grown:.0f} MiB from 511 numbers of rows", flush=True)


if __name__ == "__main__":
    main()
