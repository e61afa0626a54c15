"""Gains of DoRA (arXiv 2402.09353): from the norms that an adapter's rows shall have, and those that they have."""

import torch
from torch import Tensor

from kernels.lora import LoraWeights
from server.weights.failures import UnusableAdapter

_ROWS = 1024  # at a time: in float32 a whole matrix may be larger than the adapter


class GainError(UnusableAdapter):
    """The adapter has no gains on this base."""


def to_gains(weights: LoraWeights, base: Tensor, module: str) -> None:
    """weights.gain [out] float32 holds magnitudes; divide them by the norms of the rows of base + scale * b @ a.

    base [out, in]: the linear's own weights, as they are served. Sums in float32. Raises GainError for a row whose norm
    is zero or beyond float32: no gain makes of it what the adapter wants.
    """
    gain, a = weights.gain, weights.a.float()
    assert gain is not None
    norms = torch.empty_like(gain)
    for begin in range(0, len(base), _ROWS):
        rows = slice(begin, begin + _ROWS)
        adapted = torch.addmm(base[rows].float(), weights.b[rows].float(), a, alpha=weights.scale)
        torch.linalg.vector_norm(adapted, dim=1, out=norms[rows])
    gain.div_(norms)
    is_sound = norms.isfinite() & gain.isfinite()
    if not bool(is_sound.all()):
        row = int(is_sound.logical_not().nonzero()[0])
        raise GainError(
            f"row {row} of {module} has the norm {float(norms[row]):g} with the adapter, and no gain gives it the "
            "magnitude that DoRA trained: merge the adapter into its base, or train it again"
        )
