"""Triton form of grouped_gemm: each program walks over pieces of work, a tile of rows times a block of columns.

A tile is up to TILE rows of one expert place, as expert_route cut them. Rows are gathered as they are loaded and
scattered as they are stored, so nothing is sorted or padded in memory. How many tiles there are is known on the device
only: two programs a multiprocessor are launched, and each takes every so many-th piece of work.

At decode the time goes into reading weights. Tiles are therefore as high as it takes to read each matrix once, and no
higher. A place's matrix is found by the stride of the stack, whose other places need not be mapped.

Names of constants: T tokens with H elements and K choices each; I is an expert's inner width; TILE the rows of a tile;
BN and BK are columns of the output and elements of the depth at a time.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration, Tiles, dot, open_tile, stages
from kernels.expert_route import Routed
from kernels.gated.activation import Act, Activation
from kernels.grouped_gemm.activation import kernel as activation_kernel
from kernels.grouped_gemm.activation.kernel import act, activate
from kernels.grouped_gemm.layout import Layout

__all__ = ["activate", "combine", "configurations", "down", "gate_up", "tile_rows"]


class Blocks(NamedTuple):
    """Sizes of the tiles of one product: columns, depth; and how it is compiled."""

    columns: int
    depth: int
    num_warps: int
    num_stages: int


# by rows of a tile, for two-byte elements; four-byte ones take a quarter of the depth
_GATE_UP = {16: Blocks(64, 128, 4, 3), 32: Blocks(64, 64, 4, 3), 64: Blocks(64, 64, 4, 3)}
_DOWN = {16: Blocks(64, 128, 4, 4), 32: Blocks(64, 128, 4, 3), 64: Blocks(128, 64, 8, 3)}
_COMBINE_COLUMNS = 1024
_NO_ACT = -1  # in place of an Act: products as they are


def tile_rows(num_pairs: int, num_experts: int) -> int:
    """Twice the mean rows of an expert, as a power of two between 16 (a matrix instruction's) and 64."""
    return min(64, max(16, triton.next_power_of_2(2 * num_pairs // num_experts)))


@triton.jit
def _offsets(row, k, DEPTH: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Of elements (row, k) of a matrix [ROWS, DEPTH], or [DEPTH, ROWS] if transposed; as [k, row]."""
    if TRANSPOSED:
        return k[:, None] * ROWS + row[None, :]
    else:
        return row[None, :] * DEPTH + k[:, None]


@triton.jit
def gate_up_kernel(
    x, stack, stride, bias, h, tiles,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, TRANSPOSED: tl.constexpr, INTERLEAVED: tl.constexpr, TILE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """h[position] = act(gate) * up for each position of a tile; x [T, H], stack [places, 2I, H], h [P, I].

    ACT below 0: h [P, 2I] float32 holds gate and up in the order of the matrix's rows.
    """
    column_blocks: tl.constexpr = (I + BN - 1) // BN
    for work in range(tl.program_id(0), tl.load(tiles.num_tiles) * column_blocks, tl.num_programs(0)):
        place, start, count = open_tile(tiles, work // column_blocks)
        m = tl.arange(0, TILE)
        row_mask = m < count
        token = tl.load(tiles.pairs + start + m, mask=row_mask, other=0) // K
        n = (work % column_blocks) * BN + tl.arange(0, BN)
        column_mask = n < I
        gate_row = n * 2 if INTERLEAVED else n
        up_row = n * 2 + 1 if INTERLEAVED else n + I
        k = tl.arange(0, BK)
        weights = stack + place.to(tl.int64) * stride
        x_at = x + token.to(tl.int64)[:, None] * H + k[None, :]
        if INTERLEAVED:  # read as they lie and part afterwards: every other element would be read one at a time
            both_row = (work % column_blocks) * (2 * BN) + tl.arange(0, 2 * BN)
            both_at = weights + _offsets(both_row, k, H, 2 * I, TRANSPOSED)
            both = tl.zeros((TILE, 2 * BN), tl.float32)
            for first in range(0, H, BK):
                deep = first + k < H
                rows = tl.load(x_at + first, mask=row_mask[:, None] & deep[None, :], other=0.0)
                step = first * (2 * I) if TRANSPOSED else first
                mask = deep[:, None] & (both_row < 2 * I)[None, :]
                both = dot(rows, tl.load(both_at + step, mask=mask, other=0.0), both)
            gate, up = tl.split(tl.reshape(both, (TILE, BN, 2)))
        else:
            gate_at = weights + _offsets(gate_row, k, H, 2 * I, TRANSPOSED)
            up_at = weights + _offsets(up_row, k, H, 2 * I, TRANSPOSED)
            gate = tl.zeros((TILE, BN), tl.float32)
            up = tl.zeros((TILE, BN), tl.float32)
            for first in range(0, H, BK):
                deep = first + k < H
                rows = tl.load(x_at + first, mask=row_mask[:, None] & deep[None, :], other=0.0)
                step = first * (2 * I) if TRANSPOSED else first
                mask = deep[:, None] & column_mask[None, :]
                gate = dot(rows, tl.load(gate_at + step, mask=mask, other=0.0), gate)
                up = dot(rows, tl.load(up_at + step, mask=mask, other=0.0), up)
        if HAS_BIAS:
            bias_at = bias + place * (2 * I)
            gate += tl.load(bias_at + gate_row, mask=column_mask, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_at + up_row, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        if ACT >= 0:
            out = act(gate, up, ACT, ALPHA, LIMIT)
            h_at = h + (start + m).to(tl.int64)[:, None] * I + n[None, :]
            tl.store(h_at, out.to(h.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])
        elif INTERLEAVED:
            both = tl.reshape(tl.join(gate, up), (TILE, 2 * BN))
            h_at = h + (start + m).to(tl.int64)[:, None] * (2 * I) + both_row[None, :]
            tl.store(h_at, both.to(h.dtype.element_ty), mask=row_mask[:, None] & (both_row < 2 * I)[None, :])
        else:
            h_at = h + (start + m).to(tl.int64)[:, None] * (2 * I) + n[None, :]
            mask = row_mask[:, None] & column_mask[None, :]
            tl.store(h_at, gate.to(h.dtype.element_ty), mask=mask)
            tl.store(h_at + I, up.to(h.dtype.element_ty), mask=mask)


@triton.jit
def down_kernel(
    h, stack, stride, bias, out, tiles,
    H: tl.constexpr, I: tl.constexpr, HAS_BIAS: tl.constexpr, TRANSPOSED: tl.constexpr, TILE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[pair] = stack[place] @ h[position]; h [P, I], stack [places, H, I], out [P, H] in order of pair number."""
    column_blocks: tl.constexpr = (H + BN - 1) // BN
    for work in range(tl.program_id(0), tl.load(tiles.num_tiles) * column_blocks, tl.num_programs(0)):
        place, start, count = open_tile(tiles, work // column_blocks)
        m = tl.arange(0, TILE)
        row_mask = m < count
        pair = tl.load(tiles.pairs + start + m, mask=row_mask, other=0)
        n = (work % column_blocks) * BN + tl.arange(0, BN)
        column_mask = n < H
        k = tl.arange(0, BK)
        weights = stack + place.to(tl.int64) * stride
        weights_at = weights + _offsets(n, k, I, H, TRANSPOSED)
        h_at = h + (start + m).to(tl.int64)[:, None] * I + k[None, :]
        total = tl.zeros((TILE, BN), tl.float32)
        for first in range(0, I, BK):
            deep = first + k < I
            rows = tl.load(h_at + first, mask=row_mask[:, None] & deep[None, :], other=0.0)
            step = first * H if TRANSPOSED else first
            total = dot(rows, tl.load(weights_at + step, mask=deep[:, None] & column_mask[None, :], other=0.0), total)
        if HAS_BIAS:
            total += tl.load(bias + place * H + n, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        out_at = out + pair.to(tl.int64)[:, None] * H + n[None, :]
        tl.store(out_at, total.to(out.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def combine_kernel(rows, weights, places, out, H: tl.constexpr, K: tl.constexpr, BH: tl.constexpr):
    """out[t] = sum over k of weights[t, k] * rows[t * K + k], in the order of k whatever the order of work."""
    t = tl.program_id(0)
    n = tl.program_id(1) * BH + tl.arange(0, BH)
    total = tl.zeros((BH,), tl.float32)
    for k in tl.static_range(K):
        pair = t * K + k
        width = tl.where(tl.load(places + pair) >= 0, H, 0)  # a padding token's rows were never written
        row = tl.load(rows + pair.to(tl.int64) * H + n, mask=n < width, other=0.0).to(tl.float32)
        total += tl.where(width > 0, tl.load(weights + pair), 0.0) * row
    tl.store(out + t.to(tl.int64) * H + n, total.to(out.dtype.element_ty), mask=n < H)


def _for_size(blocks: Blocks, itemsize: int) -> Blocks:
    """Elements of four bytes are multiplied without matrix instructions, which takes registers: smaller blocks."""
    return blocks if itemsize < 4 else blocks._replace(depth=blocks.depth // 4, num_warps=8, num_stages=2)


def _gate_up_constants(
    blocks: Blocks, hidden: int, inner: int, top_k: int, tile: int, act: int, alpha: float, limit: float,
    transposed: bool, interleaved: bool, has_bias: bool,
) -> dict[str, int | float]:  # fmt: skip
    return dict(H=hidden, I=inner, K=top_k, ACT=act, ALPHA=alpha, LIMIT=limit, HAS_BIAS=has_bias,
                TRANSPOSED=transposed, INTERLEAVED=interleaved, TILE=tile, BN=blocks.columns,
                BK=blocks.depth)  # fmt: skip


def _down_constants(
    blocks: Blocks, hidden: int, inner: int, tile: int, transposed: bool, has_bias: bool
) -> dict[str, int | float]:
    return dict(H=hidden, I=inner, HAS_BIAS=has_bias, TRANSPOSED=transposed, TILE=tile, BN=blocks.columns,
                BK=blocks.depth)  # fmt: skip


def _new_gate_up(x: Tensor, pairs: Tensor, columns: int, act: int) -> Tensor:
    """Products stay as they were summed, so that the activation reads what it reads where it is computed at once."""
    if act >= 0:
        return x.new_empty(pairs.shape[0], columns // 2)
    return x.new_empty(pairs.shape[0], columns, dtype=torch.float32)


@torch.library.custom_op("heddle::expert_gate_up", mutates_args=())
def _gate_up(
    x: Tensor, stack: Tensor, bias: Tensor | None, pairs: Tensor, tiles: Tensor, num_tiles: Tensor, top_k: int,
    tile: int, act: int, alpha: float, limit: float, transposed: bool, interleaved: bool,
) -> Tensor:  # fmt: skip
    inner = stack.shape[2 if transposed else 1] // 2
    h = _new_gate_up(x, pairs, 2 * inner, act)
    blocks = _for_size(_GATE_UP[tile], x.itemsize)
    constants = _gate_up_constants(blocks, x.shape[1], inner, top_k, tile, act, alpha, limit, transposed, interleaved,
                                   bias is not None)  # fmt: skip
    # an argument that is not read still needs a pointer
    gate_up_kernel[(_programs(x, tiles, inner, blocks),)](
        x, stack, stack.stride(0), x if bias is None else bias, h, Tiles(tiles, num_tiles, pairs), **constants,
        num_warps=blocks.num_warps, num_stages=stages(blocks.num_stages),
    )  # fmt: skip
    return h


@_gate_up.register_fake
def _(
    x: Tensor, stack: Tensor, bias: Tensor | None, pairs: Tensor, tiles: Tensor, num_tiles: Tensor, top_k: int,
    tile: int, act: int, alpha: float, limit: float, transposed: bool, interleaved: bool,
) -> Tensor:  # fmt: skip
    columns = stack.shape[2 if transposed else 1]
    return _new_gate_up(x, pairs, columns, act)


@torch.library.custom_op("heddle::expert_down", mutates_args=())
def _down(
    h: Tensor, stack: Tensor, bias: Tensor | None, pairs: Tensor, tiles: Tensor, num_tiles: Tensor, tile: int,
    transposed: bool,
) -> Tensor:  # fmt: skip
    hidden = stack.shape[2 if transposed else 1]
    out = h.new_empty(h.shape[0], hidden)
    blocks = _for_size(_DOWN[tile], h.itemsize)
    constants = _down_constants(blocks, hidden, h.shape[1], tile, transposed, bias is not None)
    down_kernel[(_programs(h, tiles, hidden, blocks),)](
        h, stack, stack.stride(0), h if bias is None else bias, out, Tiles(tiles, num_tiles, pairs), **constants,
        num_warps=blocks.num_warps, num_stages=stages(blocks.num_stages),
    )  # fmt: skip
    return out


@_down.register_fake
def _(
    h: Tensor, stack: Tensor, bias: Tensor | None, pairs: Tensor, tiles: Tensor, num_tiles: Tensor, tile: int,
    transposed: bool,
) -> Tensor:  # fmt: skip
    return h.new_empty(h.shape[0], stack.shape[2 if transposed else 1])


@torch.library.custom_op("heddle::expert_combine", mutates_args=())
def _combine(rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    tokens, top_k = weights.shape
    hidden = rows.shape[1]
    out = rows.new_empty(tokens, hidden)
    constants = _combine_constants(hidden, top_k)
    combine_kernel[(tokens, triton.cdiv(hidden, constants["BH"]))](rows, weights, places, out, **constants)
    return out


def _combine_constants(hidden: int, top_k: int) -> dict[str, int]:
    return dict(H=hidden, K=top_k, BH=min(_COMBINE_COLUMNS, triton.next_power_of_2(hidden)))


@_combine.register_fake
def _(rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    return rows.new_empty(weights.shape[0], rows.shape[1])


def gate_up(
    x: Tensor,
    stack: Tensor,
    routed: Routed,
    activation: Activation | None,
    layout: Layout,
    bias: Tensor | None = None,
) -> Tensor:
    """As in reference.py."""
    return _gate_up(
        x.contiguous(), stack, bias, routed.pairs, routed.tiles, routed.num_tiles, routed.places.shape[1],
        routed.tile_rows, *_numbers(activation), layout.transposed, layout.interleaved,
    )  # fmt: skip


def _numbers(activation: Activation | None) -> tuple[int, float, float]:
    """ACT, ALPHA and LIMIT of gate_up's kernel."""
    return (_NO_ACT, 1.0, 0.0) if activation is None else (int(activation.act), activation.alpha, activation.limit)


def down(h: Tensor, stack: Tensor, routed: Routed, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """As in reference.py."""
    return _down(h, stack, bias, routed.pairs, routed.tiles, routed.num_tiles, routed.tile_rows, layout.transposed)


def combine(rows: Tensor, routed: Routed) -> Tensor:
    """As in reference.py."""
    return _combine(rows, routed.weights, routed.places)


def _programs(x: Tensor, tiles: Tensor, columns: int, blocks: Blocks) -> int:
    """Two programs a multiprocessor, unless there cannot be so much work."""
    return min(tiles.shape[0] * triton.cdiv(columns, blocks.columns), 2 * _multiprocessors(x))


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


# (name, hidden, inner, choices of a token, activation, layout, bias, element) of what is compiled ahead of time
_SHAPES = (
    ("v2-lite", 2048, 1408, 6, Activation(), Layout(), False, "bf16"),
    ("v2-lite fp32", 2048, 1408, 6, Activation(), Layout(), False, "fp32"),
    ("qwen3", 2048, 768, 8, Activation(), Layout(), False, "bf16"),
    ("gpt-oss", 2880, 2880, 4, Activation(Act.CLAMPED, 1.702, 7.0), Layout(True, True), True, "bf16"),
)


def configurations() -> Iterator[Configuration]:
    """DeepSeek-V2-Lite in bfloat16 (all tiles) and float32, Qwen3-30B-A3B, gpt-oss.

    Without an activation only V2-Lite and gpt-oss, which differ in what they store.
    """
    for name, hidden, inner, top_k, activation, layout, has_bias, element in _SHAPES:
        types = {pointer: f"*{element}:16" for pointer in ("x", "h", "stack", "bias", "out")}
        types |= {"stride": "i32:16", "tiles": Tiles("*i32:16", "*i32:16", "*i32:16")}
        itemsize = 2 if element == "bf16" else 4
        for tile in _GATE_UP:
            title = f"{name} tile {tile}"
            ways: list[tuple[str, Activation | None]] = [(f"gate_up {title}", activation)]
            if name in ("v2-lite", "gpt-oss"):
                ways.append((f"gate_up {title} without activation", None))
            blocks = _for_size(_GATE_UP[tile], itemsize)
            for way, wanted in ways:
                constants = _gate_up_constants(blocks, hidden, inner, top_k, tile, *_numbers(wanted),
                                               layout.transposed, layout.interleaved, has_bias)  # fmt: skip
                own = types if wanted is not None else types | {"h": "*fp32:16"}
                yield Configuration(way, gate_up_kernel, own, constants, blocks.num_warps, blocks.num_stages)
            blocks = _for_size(_DOWN[tile], itemsize)
            constants = _down_constants(blocks, hidden, inner, tile, layout.transposed, has_bias)
            yield Configuration(f"down {title}", down_kernel, types, constants, blocks.num_warps, blocks.num_stages)
    types = dict(rows="*bf16:16", weights="*fp32:16", places="*i32:16", out="*bf16:16")
    yield Configuration("combine v2-lite", combine_kernel, types, _combine_constants(2048, 6))
    yield from activation_kernel.configurations()
