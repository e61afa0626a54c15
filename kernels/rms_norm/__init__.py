"""rms_norm: root-mean-square norm of rows; add_rms_norm: of the sum of two, with that sum."""

from torch import Tensor

from kernels.compiled import takes
from kernels.rms_norm import reference

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True) -> Tensor:
    """See kernels/rms_norm/reference.py, as for add_rms_norm."""
    if takes(x):
        from kernels.rms_norm import kernel

        return kernel.rms_norm(x, weight, eps, offset, cast_first)
    return reference.rms_norm(x, weight, eps, offset, cast_first)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True
) -> tuple[Tensor, Tensor]:
    if takes(x):
        from kernels.rms_norm import kernel

        return kernel.add_rms_norm(x, residual, weight, eps, offset, cast_first)
    return reference.add_rms_norm(x, residual, weight, eps, offset, cast_first)
