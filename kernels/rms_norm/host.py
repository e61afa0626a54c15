"""Calls rms_norm's host kernel (host.cpp)."""

from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from kernels.host import library


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True) -> Tensor:
    """As the reference; x and weight are of one type."""
    return _launch(x, None, weight, eps, offset, cast_first)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True
) -> tuple[Tensor, Tensor]:
    """As the reference; all are of one type."""
    return _launch(x, residual, weight, eps, offset, cast_first)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    assert weight.dtype == x.dtype and weight.shape == (width,) and weight.is_contiguous()
    rows = _by_row(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    total, added, step = out, None, 0
    if residual is not None:
        assert residual.dtype == x.dtype and residual.shape == x.shape
        by_row = _by_row(residual)
        total, added, step = torch.empty(x.shape, dtype=x.dtype), by_row.data_ptr(), by_row.stride(0)
    library().heddle_rms_norm(
        c_void_p(rows.data_ptr()), c_int64(rows.stride(0)), c_void_p(added), c_int64(step), c_void_p(total.data_ptr()),
        c_void_p(weight.data_ptr()), c_void_p(out.data_ptr()), c_int64(rows.shape[0]), c_int64(width), c_float(eps),
        c_float(offset), cast_first, x.dtype is torch.bfloat16,
    )  # fmt: skip
    return out, total


def _by_row(x: Tensor) -> Tensor:
    """[rows, width], whose rows are contiguous; a copy only where no view is."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
