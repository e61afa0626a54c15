"""Gains of DoRA (arXiv 2402.09353): from the norms that an adapter's rows shall have, and those that they have."""

import torch
from torch import Tensor

from kernels.lora import LoraWeights

_ROWS = 4096  # at a time: in float32 a whole matrix may be larger than the adapter


class GainError(Exception):
    """The adapter has no gains on this base."""


def to_gains(weights: LoraWeights, base: Tensor, module: str) -> None:
    """weights.gain [out] float32 holds magnitudes; divide them by the norms of the rows of base + scale * b @ a.

    base [out, in]: the linear's own weights, as they are served. Sums in float32. Raises GainError for a row that is
    zero: no gain gives it a norm.
    """
    assert weights.gain is not None
    a = weights.a.float()
    for begin in range(0, len(base), _ROWS):
        rows = slice(begin, begin + _ROWS)
        adapted = torch.addmm(base[rows].float(), weights.b[rows].float(), a, alpha=weights.scale)
        weights.gain[rows] /= adapted.norm(dim=1)
    if not bool(weights.gain.isfinite().all()):
        raise GainError(f"a row of {module} is zero with the adapter, so DoRA cannot give it a norm")
