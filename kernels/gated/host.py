"""Calls gated's host kernel (host.cpp)."""

from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from kernels.gated.activation import Activation
from kernels.host import library


def gated(products: Tensor, activation: Activation, interleaved: bool, dtype: torch.dtype) -> Tensor:
    """As the reference; products are float32, or of `dtype`."""
    assert products.dtype in (torch.float32, dtype)
    rows = products.reshape(-1, products.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = torch.empty(*products.shape[:-1], products.shape[-1] // 2, dtype=dtype)
    library().heddle_gated(
        c_void_p(rows.data_ptr()), c_int64(rows.stride(0)), c_void_p(out.data_ptr()), c_int64(rows.shape[0]),
        c_int64(out.shape[-1]), interleaved, c_int64(activation.act), c_float(activation.alpha),
        c_float(activation.limit), products.dtype is torch.bfloat16, dtype is torch.bfloat16,
    )  # fmt: skip
    return out
