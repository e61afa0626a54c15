"""Reference and CPU path of lora: mixed ranks in one batch, each at its true rank.

Segments are contiguous, so each is two small products on views. One masked product over the ranks of all live adapters
costs every token all of them; with eight adapters it measured 1.5 to 4 times as slow (benchmarks/README.md).
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LoraWeights(NamedTuple):
    """a [rank, in], b [out, rank]: y += scale * b @ (a @ x)."""

    a: Tensor
    b: Tensor
    scale: float


class Segment(NamedTuple):
    """Rows [start, end) of the step belong to the adapter in `slot`."""

    start: int
    end: int
    slot: int


def lora(y: Tensor, x: Tensor, weights: Mapping[int, LoraWeights], segments: Sequence[Segment]) -> None:
    """Add in place: y[rows] += scale * b @ (a @ x[rows]) for each segment whose slot has weights for this linear.

    y [T, out] and x [T, in], contiguous. `weights` by adapter slot; a slot without an entry leaves its rows alone.
    """
    for start, end, slot in segments:
        adapter = weights.get(slot)
        if adapter is not None:
            shrunk = torch.mm(x[start:end], adapter.a.t())
            y[start:end].addmm_(shrunk, adapter.b.t(), alpha=adapter.scale)
