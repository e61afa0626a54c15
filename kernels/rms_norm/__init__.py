"""rms_norm: root-mean-square norm of rows; add_rms_norm: of the sum of two, which it returns as well.

    out[row] = x[row] / sqrt(mean(x[row]^2) + eps) * (offset + weight)

Running example, eps 0 and offset 0: x [[3, 4]] has the mean square 12.5, so the row is divided by 3.536. With the
weight [1, 2] that gives [[0.849, 2.263]]. add_rms_norm of x [[1, 3]] and residual [[2, 1]] gives the same, and their
sum [[3, 4]].
"""

from torch import Tensor

from kernels.compiled import takes
from kernels.host import takes as host_takes
from kernels.lora.delta import Delta
from kernels.rms_norm import host, reference

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True) -> Tensor:
    """See reference.py for shapes."""
    if takes(x):
        from kernels.rms_norm import kernel

        return kernel.rms_norm(x, weight, eps, offset, cast_first)
    if host_takes(x) and weight.dtype == x.dtype:
        return host.rms_norm(x, weight, eps, offset, cast_first)
    return reference.rms_norm(x, weight, eps, offset, cast_first)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    delta: Delta | None = None,
) -> tuple[Tensor, Tensor]:
    """See reference.py for shapes. delta: what adapters add to x, and is not added yet; for Triton's kernel."""
    if takes(x):
        from kernels.rms_norm import kernel

        return kernel.add_rms_norm(x, residual, weight, eps, offset, cast_first, delta)
    assert delta is None
    if host_takes(x) and weight.dtype == x.dtype:
        return host.add_rms_norm(x, residual, weight, eps, offset, cast_first)
    return reference.add_rms_norm(x, residual, weight, eps, offset, cast_first)
