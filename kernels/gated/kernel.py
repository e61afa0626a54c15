"""Triton form of gated: a program computes a block of columns of one row.

It computes in float32 and rounds once, as the kernels of routed experts do (kernels/grouped_gemm/activation). With
LoRA, whose delta is added on the way, an item is a tile of an adapter's rows and a block of columns, and program p
takes items p, p + P, p + 2P, ...
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration
from kernels.compiled.launch import launch
from kernels.gated.activation import Act, Activation
from kernels.grouped_gemm.activation.kernel import act
from kernels.lora.delta import Delta
from kernels.lora.pending.kernel import configured, constants_of, pending_of, programs, types_of
from kernels.lora.products.kernel import adapted, tile_of

_COLUMNS = 1024  # of a program, which reads twice as many
_ADAPTED_BYTES, _ADAPTED_WARPS = 256, 8  # of an item's columns in a row; its warps


@triton.jit
def gated_kernel(
    products, stride, h,  # [T, 2I], rows `stride` apart; [T, I], contiguous
    I: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """h = act(gate) * up. Programs: (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    source = products + row * stride
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    if INTERLEAVED:  # one contiguous load, parted in registers
        both_at = tl.program_id(1) * (2 * BN) + tl.arange(0, 2 * BN)
        both = tl.load(source + both_at, mask=both_at < 2 * I, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, (BN, 2)))
    else:
        gate = tl.load(source + n, mask=n < I, other=0.0).to(tl.float32)
        up = tl.load(source + I + n, mask=n < I, other=0.0).to(tl.float32)
    out = act(gate, up, ACT, ALPHA, LIMIT)
    tl.store(h + row * I + n, out.to(h.dtype.element_ty), mask=n < I)


@triton.jit(do_not_specialize=["T", "max_rank"])
def adapted_kernel(
    products, stride, h, pending, T, max_rank,
    I: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, SL: tl.constexpr, SPLITS: tl.constexpr, RB: tl.constexpr, DT: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The same of products that lack what adapters add (Pending)."""
    BLOCKS: tl.constexpr = (I + BN - 1) // BN
    for item in range(tl.program_id(0), tl.load(pending.num_tiles) * BLOCKS, tl.num_programs(0)):
        slot, rows, present = tile_of(pending, item // BLOCKS, TILE)
        n = item % BLOCKS * BN + tl.arange(0, BN)
        mask = present[:, None] & (n < I)[None, :]
        source = products + rows[:, None] * stride + n[None, :]
        gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(source + I, mask=mask, other=0.0).to(tl.float32)
        gate = adapted(gate, pending, slot, 0, rows, present, n, n < I, T, max_rank,
                       HAS_BIAS, SL, SPLITS, TILE, BN, RB, DT)  # fmt: skip
        up = adapted(up, pending, slot, 1, rows, present, n, n < I, T, max_rank,
                     HAS_BIAS, SL, SPLITS, TILE, BN, RB, DT)  # fmt: skip
        out = act(gate, up, ACT, ALPHA, LIMIT)
        tl.store(h + rows[:, None] * I + n[None, :], out.to(h.dtype.element_ty), mask=mask)


def _constants(inner: int, act: int, alpha: float, limit: float, interleaved: bool) -> dict[str, int | float]:
    return dict(I=inner, ACT=int(act), ALPHA=alpha, LIMIT=limit, INTERLEAVED=interleaved,
                BN=min(_COLUMNS, triton.next_power_of_2(inner)))  # fmt: skip


@launch("gated")
def _gated(products: Tensor, act: int, alpha: float, limit: float, interleaved: bool) -> Tensor:
    rows = products.reshape(-1, products.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = _new(products)
    if out.numel():
        constants = _constants(out.shape[-1], act, alpha, limit, interleaved)
        gated_kernel[(len(rows), triton.cdiv(out.shape[-1], constants["BN"]))](rows, rows.stride(0), out, **constants)
    return out


@_gated.register_fake
def _(products: Tensor, act: int, alpha: float, limit: float, interleaved: bool) -> Tensor:
    return _new(products)


@launch("gated_adapted")
def _gated_adapted(
    products: Tensor, act: int, alpha: float, limit: float, z: Tensor, table: Tensor, offsets: Tensor,
    bias: Tensor | None, tiles: Tensor, num_tiles: Tensor,
) -> Tensor:  # fmt: skip
    rows = products.reshape(-1, products.shape[-1])
    assert rows.stride(-1) == 1 and z.shape[1] == 2
    out = _new(products)
    if out.numel():
        inner = out.shape[-1]
        constants = _adapted_constants(inner, act, alpha, limit, products.itemsize)
        constants |= constants_of(z.shape[0], 2, products.dtype, bias is not None)
        adapted_kernel[(programs(len(tiles) * triton.cdiv(inner, constants["BN"]), products),)](
            rows, rows.stride(0), out, pending_of(z, table, offsets, bias, tiles, num_tiles, products), len(rows),
            z.shape[3], **constants, num_warps=_ADAPTED_WARPS, num_stages=1,
        )  # fmt: skip
    return out


@_gated_adapted.register_fake
def _(products: Tensor, *_: object) -> Tensor:
    return _new(products)


def _adapted_constants(inner: int, act: int, alpha: float, limit: float, itemsize: int) -> dict[str, Any]:
    return dict(I=inner, ACT=int(act), ALPHA=alpha, LIMIT=limit, BN=_ADAPTED_BYTES // itemsize)


def _new(products: Tensor) -> Tensor:
    return torch.empty(*products.shape[:-1], products.shape[-1] // 2, dtype=products.dtype, device=products.device)


def gated(products: Tensor, activation: Activation, interleaved: bool = False, delta: Delta | None = None) -> Tensor:
    """As in reference.py, of products that lack the delta, if there is one."""
    if delta is not None:
        assert not interleaved
        it = activation
        return _gated_adapted(products, int(it.act), it.alpha, it.limit, *delta.tensors)
    return _gated(products, int(activation.act), activation.alpha, activation.limit, interleaved)


def configurations() -> Iterator[Configuration]:
    """Of Llama-3.1-8B, of its float32 form, and Gemma 2's."""
    for name, inner, activation, element in (
        ("llama", 14336, Act.SILU, "bf16"), ("llama fp32", 14336, Act.SILU, "fp32"),
        ("gemma2", 14336, Act.GELU_TANH, "bf16"),
    ):  # fmt: skip
        types = dict(products=f"*{element}:16", stride="i32:16", h=f"*{element}:16")
        yield Configuration(name, gated_kernel, types, _constants(inner, activation, 1.0, 0.0, False))
        types |= dict(pending=types_of(element), T="i32", max_rank="i32")
        constants = _adapted_constants(inner, activation, 1.0, 0.0, 4 if element == "fp32" else 2)
        constants |= configured(4096, 2, element)
        yield Configuration(f"{name} adapted", adapted_kernel, types, constants, _ADAPTED_WARPS, num_stages=1)
