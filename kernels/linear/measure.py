"""How long products take in each form, on this machine, now."""

import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.linear.forms import Form
from kernels.linear.matrix import Matrix

_ROUNDS = 9
_LEAST_ROUNDS = 4
_STEADY = 1.6  # the median over the least: more, and somebody else has the cores
_SPREAD_BYTES = 16 << 20  # matrices in turn: one that stays in a core's cache is faster than it is within a model
_MOST_COPIES = 4
_MOST_BYTES = 32 << 20  # of a larger matrix, as many rows: its time is in proportion, and packed copies need room


class Measured(NamedTuple):
    times: dict[str, list[float]]  # the form's name -> seconds of one product, for each number of rows
    is_steady: bool  # times of the same work were alike; else they say more of other processes than of the forms


def measure(
    weight: Tensor,
    bias: Tensor | None,
    forms: Sequence[Form],
    row_counts: Sequence[int],
    budget_s: float,
    least: int = 1,
) -> Measured:
    """For each number of rows that there was time for, the first `least` always. row_counts ascend.

    The least times of rounds in which every form has its turn: what else runs on the machine only ever adds.
    """
    weight = weight[: max(1, _MOST_BYTES // (weight.shape[1] * weight.itemsize))]
    bias = None if bias is None else bias[: len(weight)]
    copies = max(1, min(_MOST_COPIES, _SPREAD_BYTES // weight.nbytes))
    started = time.perf_counter()
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]
    matrices = {form.name: [Matrix(it, [form]) for it in weights] for form in forms}
    found: dict[str, list[float]] = {form.name: [] for form in forms}
    took, rows_before, spread = 0.0, 0, []
    for rows in row_counts:
        left = budget_s - (time.perf_counter() - started)
        if len(spread) >= least * len(forms) and took * rows / rows_before > left:  # no faster than before, by row
            break
        began = time.perf_counter()
        x = torch.randn(rows, weight.shape[1]).to(weight.dtype)
        for name, times in _times(matrices, {form.name: form for form in forms}, x, bias, left).items():
            found[name].append(min(times))
            spread.append(median(times) / min(times))
        took, rows_before = time.perf_counter() - began, rows
    return Measured(found, median(spread) <= _STEADY)


def _times(
    matrices: dict[str, list[Matrix]], forms: dict[str, Form], x: Tensor, bias: Tensor | None, left_s: float
) -> dict[str, list[float]]:
    deadline = time.perf_counter() + left_s
    for name, form in forms.items():
        matrices[name][0].product(form, x, bias)  # oneDNN compiles for a shape once
    rounds: dict[str, list[float]] = {name: [] for name in forms}
    for count in range(_ROUNDS):
        if count >= _LEAST_ROUNDS and time.perf_counter() > deadline:
            break
        for name, form in forms.items():
            began = time.perf_counter()
            for matrix in matrices[name]:
                matrix.product(form, x, bias)
            rounds[name].append((time.perf_counter() - began) / len(matrices[name]))
    return rounds
