"""Norms in one launch each, in place of the several that Transformers' take."""

from torch import Tensor, nn

from kernels.rms_norm import rms_norm
from server.model.families import Foreign


class RmsNorm(nn.Module):
    """Takes the place of a family's norm, with its rounding (kernels/rms_norm/reference.py)."""

    def __init__(self, original: Foreign) -> None:
        super().__init__()
        self.weight: Tensor = original.weight
        name = type(original).__name__
        self._eps: float = original.eps if name == "Gemma2RMSNorm" else original.variance_epsilon
        self._offset = 1.0 if name == "Gemma2RMSNorm" else 0.0
        self._cast_first = name not in ("Gemma2RMSNorm", "GptOssRMSNorm")

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self._eps, self._offset, self._cast_first)
