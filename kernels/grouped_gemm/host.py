"""Calls grouped_gemm's host kernels (host.cpp)."""

import ctypes
from ctypes import byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor

from kernels.expert_route import Routed
from kernels.gated import host as gated_host
from kernels.gated.activation import Activation
from kernels.grouped_gemm.layout import Layout
from kernels.host import library


class _Grouped(ctypes.Structure):
    """Grouped in host.cpp, field by field."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "stack", "bias", "out")),
        *((name, c_int64) for name in ("x_step", "out_step", "place_step", "weight_step", "depth", "columns")),
        *((name, c_void_p) for name in ("tiles", "pairs")),
        *((name, c_int64) for name in (
            "num_tiles", "in_divisor", "gathers", "scatters", "transposed", "interleaved", "act",
        )),
        ("alpha", c_float),
        ("limit", c_float),
    ]  # fmt: skip


def gate_up(
    x: Tensor, stack: Tensor, routed: Routed, activation: Activation | None, layout: Layout, bias: Tensor | None = None
) -> Tensor:
    """As the reference. Products without an activation are float32."""
    columns = stack.shape[2 if layout.transposed else 1]
    if activation is None:
        out = x.new_empty(len(routed.pairs), columns, dtype=torch.float32)
    else:
        out = x.new_empty(len(routed.pairs), columns // 2)
    _launch(x, stack, bias, out, routed, layout, activation, gathers=True)
    return out


def down(h: Tensor, stack: Tensor, routed: Routed, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """As the reference."""
    out = h.new_empty(len(routed.pairs), stack.shape[2 if layout.transposed else 1])
    _launch(h, stack, bias, out, routed, layout, None, gathers=False)
    return out


def activate(products: Tensor, activation: Activation, interleaved: bool, routed: Routed, dtype: torch.dtype) -> Tensor:
    """As the reference; products are float32."""
    return gated_host.gated(products, activation, interleaved, dtype)


def combine(rows: Tensor, routed: Routed, beside: Tensor | None = None, only_own: bool = False) -> Tensor:
    """As the reference."""
    rows, weights, places = rows.contiguous(), routed.weights.contiguous(), routed.places.contiguous()
    beside = None if beside is None else beside.contiguous()
    tokens, choices = weights.shape
    out = rows.new_empty(tokens, rows.shape[-1])
    library().heddle_combine(
        c_void_p(rows.data_ptr()), c_void_p(weights.data_ptr()), c_void_p(places.data_ptr()), c_void_p(out.data_ptr()),
        c_void_p(None if beside is None else beside.data_ptr()), c_int64(only_own), c_int64(tokens), c_int64(choices),
        c_int64(rows.shape[-1]), rows.dtype is torch.bfloat16,
    )  # fmt: skip
    return out


def _launch(
    x: Tensor, stack: Tensor, bias: Tensor | None, out: Tensor, routed: Routed, layout: Layout,
    activation: Activation | None, gathers: bool,
) -> None:  # fmt: skip
    if x.stride(-1) != 1:
        x = x.contiguous()
    assert stack.dtype == x.dtype and stack.stride(2) == 1
    assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
    depth, columns = stack.shape[1:] if layout.transposed else (stack.shape[2], stack.shape[1])
    assert x.shape[1] == depth and routed.tiles.is_contiguous() and routed.pairs.is_contiguous()
    it = _Grouped(
        x.data_ptr(), stack.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr(),
        x.stride(0), out.shape[1], stack.stride(0), stack.stride(1), depth, columns,
        routed.tiles.data_ptr(), routed.pairs.data_ptr(), int(routed.num_tiles), routed.places.shape[1],
        gathers, not gathers, layout.transposed, layout.interleaved, -1 if activation is None else activation.act,
        0.0 if activation is None else activation.alpha, 0.0 if activation is None else activation.limit,
    )  # fmt: skip
    library().heddle_grouped(byref(it), x.dtype is torch.bfloat16)
