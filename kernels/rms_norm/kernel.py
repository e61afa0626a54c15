"""Triton form of rms_norm and add_rms_norm: a program keeps whole rows in registers, several short ones or a long one.

So a row is read once and written once. That limits how long a row may be: MAX_WIDTH.

With LoRA, whose delta is added on the way, many programs share a row: an item is a tile of an adapter's rows and a
block of columns, and program p takes items p, p + P, p + 2P, ... Each stores its part of the sum and of the sum of
squares and counts itself as arrived; the last to arrive at a tile norms its rows. No program waits for another, and
parts are added in a fixed order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration
from kernels.compiled.launch import launch
from kernels.lora.delta import Delta
from kernels.lora.pending.kernel import configured, constants_of, pending_of, programs, types_of
from kernels.lora.products.kernel import adapted, tile_of

MAX_WIDTH = 16384  # elements of a row, which fit into the registers of 16 warps
_ADAPTED_COLUMNS, _ADAPTED_WARPS = 128, 8  # of an item
_NORMED_COLUMNS = 1024  # at a time by the last program of a tile, for which everybody waits
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


@triton.jit(do_not_specialize=["T", "max_rank"])
def _adapted_kernel(
    x, stride, residual, r_stride, weight, out, total,  # [T, H] each, the last two contiguous; weight [H]
    squares,  # [blocks of columns, T] float32: scratch
    counters,  # [tiles] int32, zero; left zero
    pending, T, max_rank, H, eps, offset,
    CAST_FIRST: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    SL: tl.constexpr, SPLITS: tl.constexpr, RB: tl.constexpr, DT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(H, BN)
    column = tl.arange(0, BN)
    for item in range(tl.program_id(0), tl.load(pending.num_tiles) * blocks, tl.num_programs(0)):
        tile, block = item // blocks, item % blocks
        slot, rows, present = tile_of(pending, tile, TILE)
        n = block * BN + column
        mask = present[:, None] & (n < H)[None, :]
        at = rows[:, None] * H + n[None, :]
        added = tl.load(x + rows[:, None] * stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
        other = tl.load(residual + rows[:, None] * r_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
        added = adapted(added, pending, slot, 0, rows, present, n, n < H, T, max_rank,
                        HAS_BIAS, SL, SPLITS, TILE, BN, RB, DT)  # fmt: skip
        rounded = (added + other).to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=mask)
        values = rounded.to(tl.float32)
        tl.store(squares + block.to(tl.int64) * T + rows, tl.sum(values * values, 1), mask=present)
        tl.debug_barrier()  # all threads have stored before one of them says so
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if arrived == blocks - 1:
            tl.store(counters + tile, 0)
            part = tl.arange(0, PARTS)
            at_part = squares + part.to(tl.int64)[:, None] * T + rows[None, :]
            parts = tl.load(at_part, mask=(part < blocks)[:, None] & present[None, :], other=0.0, cache_modifier=".cg")
            inverse = tl.rsqrt(tl.sum(parts, 0) / H + eps)
            for first in range(0, H, WIDE):
                wide = first + tl.arange(0, WIDE)
                there = present[:, None] & (wide < H)[None, :]
                target = rows[:, None] * H + wide[None, :]
                normed = tl.load(total + target, mask=there, other=0.0, cache_modifier=".cg").to(tl.float32)
                normed = normed * inverse[:, None]
                if CAST_FIRST:
                    normed = normed.to(out.dtype.element_ty).to(tl.float32)
                scale = tl.load(weight + wide, mask=wide < H, other=0.0).to(tl.float32) + offset
                tl.store(out + target, (normed * scale[None, :]).to(out.dtype.element_ty), mask=there)


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


@launch("rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True) -> Tensor:
    return _launch(x, None, weight, eps, offset, cast_first)[0]


@launch("add_rms_norm")
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True
) -> tuple[Tensor, Tensor]:
    assert x.shape == residual.shape and x.dtype == residual.dtype
    return _launch(x, residual, weight, eps, offset, cast_first)


@launch("add_rms_norm_adapted", mutates_args=("counters",))
def _add_rms_norm_adapted(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool, counters: Tensor,
    z: Tensor, table: Tensor, offsets: Tensor, bias: Tensor | None, tiles: Tensor, num_tiles: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert x.shape == residual.shape and x.dtype == residual.dtype and z.shape[1] == 1
    assert weight.shape == (x.shape[-1],) and weight.is_contiguous() and len(counters) >= len(tiles)
    added, other = (_by_row(it) for it in (x, residual))
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if out.numel():
        count, width = added.shape
        blocks = triton.cdiv(width, _ADAPTED_COLUMNS)
        squares = torch.empty(blocks, count, dtype=torch.float32, device=x.device)
        _adapted_kernel[(programs(len(tiles) * blocks, x),)](
            added, added.stride(0), other, other.stride(0), weight, out, total, squares, counters,
            pending_of(z, table, offsets, bias, tiles, num_tiles, x), count, z.shape[3], width, eps, offset,
            CAST_FIRST=cast_first, **_adapted_columns(width),
            **constants_of(z.shape[0], 1, x.dtype, bias is not None), num_warps=_ADAPTED_WARPS,
            num_stages=1,
        )  # fmt: skip
    return out, total


def _adapted_columns(width: int) -> dict[str, int]:
    parts = triton.next_power_of_2(triton.cdiv(width, _ADAPTED_COLUMNS))
    return dict(BN=_ADAPTED_COLUMNS, WIDE=min(_NORMED_COLUMNS, triton.next_power_of_2(width)), PARTS=parts)


def _by_row(x: Tensor) -> Tensor:
    """[rows, width], whose rows are contiguous; a copy only where no view is."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_add_rms_norm.register_fake
@_add_rms_norm_adapted.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=x.dtype, device=x.device)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float = 0.0,
    cast_first: bool = True,
    delta: Delta | None = None,
) -> tuple[Tensor, Tensor]:
    """As in reference.py, of an x that lacks the delta, if there is one."""
    if delta is None:
        return _add_rms_norm(x, residual, weight, eps, offset, cast_first)
    counters = delta.cover.counters
    assert counters is not None
    return _add_rms_norm_adapted(x, residual, weight, eps, offset, cast_first, counters, *delta.tensors)


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
    for width, cast_first, dtype in ((4096, True, "bf16"), (4096, True, "fp32"), (2880, False, "bf16")):
        pointer = f"*{dtype}:16"
        yield Configuration(
            name=f"add {width} {dtype} adapted",
            kernel=_adapted_kernel,
            types={name: pointer for name in ("x", "residual", "weight", "out", "total")}
            | {"squares": "*fp32:16", "counters": "*i32:16", "pending": types_of(dtype), "T": "i32", "max_rank": "i32"}
            | {name: "i32:16" for name in ("stride", "r_stride", "H")}
            | {"eps": "fp32", "offset": "fp32"},
            constants={"CAST_FIRST": cast_first} | _adapted_columns(width) | configured(14336, 1, dtype),
            num_warps=_ADAPTED_WARPS,
            num_stages=1,
        )
