"""Triton form of rms_norm and add_rms_norm: a program keeps whole rows in registers, several short ones or a long one.

So a row is read once and written once. That limits how long a row may be: MAX_WIDTH.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration

MAX_WIDTH = 16384  # elements of a row, which fit into the registers of 16 warps
_TILE = 1024  # elements that a program takes at least: several rows, where rows are shorter than that


@triton.jit(do_not_specialize=["rows", "inner"])
def _rms_norm(
    x,  # [outer, inner, H], row (o, i) at o * x_outer + i * x_inner
    residual,  # the same with its own strides, or unused
    weight,  # [H]
    out,  # [outer * inner, H], contiguous
    total,  # the same, or unused: x + residual
    rows,  # outer * inner
    inner,
    x_outer,
    x_inner,
    r_outer,
    r_inner,
    H,
    eps,
    offset,
    ADD: tl.constexpr,
    CAST_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < H)[None, :]
    o, i = row // inner, row % inner
    values = tl.load(x + (o * x_outer + i * x_inner)[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    at = row[:, None] * H + column[None, :]
    if ADD:
        other = tl.load(residual + (o * r_outer + i * r_inner)[:, None] + column[None, :], mask=mask, other=0.0)
        rounded = (values + other.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=mask)
        values = rounded.to(tl.float32)
    normed = values * tl.rsqrt(tl.sum(values * values, 1) / H + eps)[:, None]
    if CAST_FIRST:
        normed = normed.to(out.dtype.element_ty).to(tl.float32)
    scale = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32) + offset
    tl.store(out + at, (normed * scale[None, :]).to(out.dtype.element_ty), mask=mask)


def _tile(width: int) -> tuple[int, int, int]:
    """(rows a program, their padded width, warps)."""
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    return rows, block, min(16, max(1, rows * block // 512))


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x as [outer, inner, H] without a copy where its strides allow: (x, inner, stride of outer, stride of inner).

    Two dimensions of rows because the heads of a slice of a fused projection are not evenly spaced across tokens.
    """
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    if len(dims) > 2:
        return _strided(x.contiguous())
    (_, outer_stride), (inner, inner_stride) = ([(1, 0)] * 2 + dims)[-2:]
    return x, inner, outer_stride, inner_stride


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    assert width <= MAX_WIDTH and weight.shape == (width,) and weight.is_contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    if not out.numel():
        return out, total
    count = out.numel() // width
    x, inner, x_outer, x_inner = _strided(x)
    r_outer = r_inner = 0
    if residual is not None:
        residual, r_dim, r_outer, r_inner = _strided(residual)
        if r_dim != inner:  # the two merge differently: give both their plainest form
            x, inner, x_outer, x_inner = _strided(x.contiguous())
            residual, _, r_outer, r_inner = _strided(residual.contiguous())
    rows, block, warps = _tile(width)
    _rms_norm[(triton.cdiv(count, rows),)](
        x, x if residual is None else residual, weight, out, total, count, inner, x_outer, x_inner, r_outer, r_inner,
        width, eps, offset, ADD=residual is not None, CAST_FIRST=cast_first, ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out, total


@torch.library.custom_op("heddle::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True) -> Tensor:
    return _launch(x, None, weight, eps, offset, cast_first)[0]


@torch.library.custom_op("heddle::add_rms_norm", mutates_args=())
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True
) -> tuple[Tensor, Tensor]:
    assert x.shape == residual.shape and x.dtype == residual.dtype
    return _launch(x, residual, weight, eps, offset, cast_first)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@add_rms_norm.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True
) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)


def configurations() -> Iterator[Configuration]:
    """Head dimensions, latents of DeepSeek's attention, and hidden sizes; with a residual too, up to the widest."""
    for width, add, cast_first, dtype in (
        (128, False, True, "bf16"), (512, False, True, "bf16"), (2048, False, True, "bf16"),
        (2880, False, False, "bf16"), (4096, False, True, "bf16"), (4096, False, True, "fp32"),
        (4096, True, True, "bf16"), (4096, True, True, "fp32"), (8192, True, True, "bf16"), (16384, True, True, "bf16"),
    ):  # fmt: skip
        rows, block, warps = _tile(width)
        yield Configuration(
            name=f"{'add ' if add else ''}{width} {dtype}",
            kernel=_rms_norm,
            types={name: f"*{dtype}:16" for name in ("x", "residual", "weight", "out", "total")}
            | {name: "i32:16" for name in ("x_outer", "x_inner", "r_outer", "r_inner", "H")}
            | {"rows": "i32", "inner": "i32", "eps": "fp32", "offset": "fp32"},
            constants={"ADD": add, "CAST_FIRST": cast_first, "ROWS": rows, "BLOCK": block},
            num_warps=warps,
        )
