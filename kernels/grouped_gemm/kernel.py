"""Triton form of grouped_gemm: each program walks over pieces of work, a tile of rows times a block of columns.

A tile is up to TILE rows of one expert place, as expert_route cut them. Rows are gathered as they are loaded and
scattered as they are stored, so nothing is sorted or padded in memory. How many tiles there are is known on the device
only: as many programs are launched as run at once, and each takes every so many-th piece of work.

At decode the time goes into reading weights. Tiles are therefore as high as it takes to read each matrix once, and no
higher. At prefill it goes into what all programs together read from L2, rows and weights anew for each piece: pieces
are large, and those that read the same weights are next to each other.

A place's matrix is found by the stride of the stack, whose other places need not be mapped. Where chips have
descriptors, those read the weights of large pieces; they know where a place ends and read no further.

Names of constants: T tokens with H elements and K choices each; I is an expert's inner width; TILE the rows of a tile;
BN and BK are columns of the output and elements of the depth at a time.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.compiled.kernel import AMD, NVIDIA, Chip, Configuration, Tiles, chip_of, dot, open_tile, stages
from kernels.compiled.launch import launch
from kernels.compiled.tiles import size_on
from kernels.expert_route import Routed
from kernels.gated.activation import Act, Activation
from kernels.grouped_gemm.activation import kernel as activation_kernel
from kernels.grouped_gemm.activation.kernel import act, activate
from kernels.grouped_gemm.layout import Layout
from kernels.grouped_gemm.tiles import DOWN, GATE_UP, TILE_ROWS, Blocks, tile_rows

__all__ = ["activate", "combine", "configurations", "down", "gate_up", "tile_rows"]


_COMBINE_COLUMNS = 1024
_NO_ACT = -1  # in place of an Act: products as they are


@triton.jit
def _offsets(row, k, DEPTH: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Of elements (row, k) of a matrix [ROWS, DEPTH], or [DEPTH, ROWS] if transposed; as [k, row]."""
    if TRANSPOSED:
        return k[:, None] * ROWS + row[None, :]
    else:
        return row[None, :] * DEPTH + k[:, None]


@triton.jit
def _piece(work, num_tiles, COLUMN_BLOCKS: tl.constexpr, GROUP: tl.constexpr):
    """(tile, column block) of a piece of work: those of GROUP tiles together, one column block after another.

    So what of a place's matrix is read for one of its tiles is still in the cache when the next one reads it.
    """
    if GROUP == 1:
        return work // COLUMN_BLOCKS, work % COLUMN_BLOCKS
    else:
        first = work // (GROUP * COLUMN_BLOCKS) * GROUP
        size = tl.minimum(num_tiles - first, GROUP)
        within = work - first * COLUMN_BLOCKS
        return first + within % size, within // size


@triton.jit
def gate_up_kernel(
    x, stack, stride, bias, h, tiles,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, TRANSPOSED: tl.constexpr, INTERLEAVED: tl.constexpr, TMA: tl.constexpr,
    TILE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """h[position] = act(gate) * up for each position of a tile; x [T, H], stack [places, 2I, H], h [P, I].

    ACT below 0: h [P, 2I] float32 holds gate and up in the order of the matrix's rows. TMA: stack is a descriptor of
    [places, 2, I, H].

    Gate and up are one product of 2 BN columns, which alternate, so that a thread has both; or one half each, where
    only that reads what lies together.
    """
    column_blocks: tl.constexpr = (I + BN - 1) // BN
    num_tiles = tl.load(tiles.num_tiles)
    for work in range(tl.program_id(0), num_tiles * column_blocks, tl.num_programs(0)):
        tile, column_block = _piece(work, num_tiles, column_blocks, GROUP)
        place, start, count = open_tile(tiles, tile)
        m = tl.arange(0, TILE)
        row_mask = m < count
        token = tl.load(tiles.pairs + start + m, mask=row_mask, other=0) // K
        n = column_block * BN + tl.arange(0, BN)
        column_mask = n < I
        k = tl.arange(0, BK)
        x_at = x + token.to(tl.int64)[:, None] * H + k[None, :]
        both = tl.zeros((TILE, 2 * BN), tl.float32)
        if TMA:
            for first in range(0, H, BK):
                deep = first + k < H
                rows = tl.load(x_at + first, mask=row_mask[:, None] & deep[None, :], other=0.0)
                weights = stack.load([place, 0, column_block * BN, first])
                both = dot(rows, tl.reshape(weights, (2 * BN, BK)).T, both)
        else:
            c = tl.arange(0, 2 * BN)
            if INTERLEAVED:
                row = c
                wanted = column_block * (2 * BN) + c < 2 * I
            elif TRANSPOSED:
                row = c % BN + c // BN * I
                wanted = column_block * BN + c % BN < I
            else:
                row = c // 2 + c % 2 * I
                wanted = column_block * BN + c // 2 < I
            first_row = column_block * (2 * BN if INTERLEAVED else BN)
            block_at = stack + place.to(tl.int64) * stride + first_row * (1 if TRANSPOSED else H)
            weights_at = block_at + _offsets(row, k, H, 2 * I, TRANSPOSED)
            for first in range(0, H, BK):
                deep = first + k < H
                rows = tl.load(x_at + first, mask=row_mask[:, None] & deep[None, :], other=0.0)
                step = first * (2 * I) if TRANSPOSED else first
                weights = tl.load(weights_at + step, mask=deep[:, None] & wanted[None, :], other=0.0)
                both = dot(rows, weights, both)
        if TMA or (TRANSPOSED and not INTERLEAVED):
            gate, up = tl.split(tl.permute(tl.reshape(both, (TILE, 2, BN)), (0, 2, 1)))
        else:
            gate, up = tl.split(tl.reshape(both, (TILE, BN, 2)))
        if HAS_BIAS:
            bias_at = bias + place * (2 * I)
            gate_row = n * 2 if INTERLEAVED else n
            up_row = n * 2 + 1 if INTERLEAVED else n + I
            gate += tl.load(bias_at + gate_row, mask=column_mask, other=0.0).to(tl.float32)[None, :]
            up += tl.load(bias_at + up_row, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        position = (start + m).to(tl.int64)[:, None]
        mask = row_mask[:, None] & column_mask[None, :]
        if ACT >= 0:
            out = act(gate, up, ACT, ALPHA, LIMIT)
            tl.store(h + position * I + n[None, :], out.to(h.dtype.element_ty), mask=mask)
        elif INTERLEAVED:
            both_row = column_block * (2 * BN) + tl.arange(0, 2 * BN)
            h_at = h + position * (2 * I) + both_row[None, :]
            out = tl.reshape(tl.join(gate, up), (TILE, 2 * BN)).to(h.dtype.element_ty)
            tl.store(h_at, out, mask=row_mask[:, None] & (both_row < 2 * I)[None, :])
        else:
            h_at = h + position * (2 * I) + n[None, :]
            tl.store(h_at, gate.to(h.dtype.element_ty), mask=mask)
            tl.store(h_at + I, up.to(h.dtype.element_ty), mask=mask)


@triton.jit
def down_kernel(
    h, stack, stride, bias, out, tiles,
    H: tl.constexpr, I: tl.constexpr, HAS_BIAS: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr,
    TILE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[pair] = stack[place] @ h[position]; h [P, I], stack [places, H, I], out [P, H] in order of pair number."""
    column_blocks: tl.constexpr = (H + BN - 1) // BN
    num_tiles = tl.load(tiles.num_tiles)
    for work in range(tl.program_id(0), num_tiles * column_blocks, tl.num_programs(0)):
        tile, column_block = _piece(work, num_tiles, column_blocks, GROUP)
        place, start, count = open_tile(tiles, tile)
        m = tl.arange(0, TILE)
        row_mask = m < count
        pair = tl.load(tiles.pairs + start + m, mask=row_mask, other=0)
        n = column_block * BN + tl.arange(0, BN)
        column_mask = n < H
        k = tl.arange(0, BK)
        h_at = h + (start + m).to(tl.int64)[:, None] * I + k[None, :]
        total = tl.zeros((TILE, BN), tl.float32)
        if TMA:
            for first in range(0, I, BK):
                deep = first + k < I
                rows = tl.load(h_at + first, mask=row_mask[:, None] & deep[None, :], other=0.0)
                weights = stack.load([place, column_block * BN, first])
                total = dot(rows, tl.reshape(weights, (BN, BK)).T, total)
        else:
            weights_at = stack + place.to(tl.int64) * stride + _offsets(n, k, I, H, TRANSPOSED)
            for first in range(0, I, BK):
                deep = first + k < I
                rows = tl.load(h_at + first, mask=row_mask[:, None] & deep[None, :], other=0.0)
                step = first * H if TRANSPOSED else first
                weights = tl.load(weights_at + step, mask=deep[:, None] & column_mask[None, :], other=0.0)
                total = dot(rows, weights, total)
        if HAS_BIAS:
            total += tl.load(bias + place * H + n, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        out_at = out + pair.to(tl.int64)[:, None] * H + n[None, :]
        tl.store(out_at, total.to(out.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def combine_kernel(
    rows, weights, places, beside, out, H: tl.constexpr, K: tl.constexpr, BH: tl.constexpr, HAS_BESIDE: tl.constexpr,
    ONLY_OWN: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of weights[t, k] * rows[t * K + k], in the order of k whatever the order of work; then what
    is beside."""
    t = tl.program_id(0)
    n = tl.program_id(1) * BH + tl.arange(0, BH)
    total = tl.zeros((BH,), tl.float32)
    for k in tl.static_range(K):
        pair = t * K + k
        width = tl.where(tl.load(places + pair) >= 0, H, 0)  # a padding token's rows were never written
        row = tl.load(rows + pair.to(tl.int64) * H + n, mask=n < width, other=0.0).to(tl.float32)
        total += tl.where(width > 0, tl.load(weights + pair), 0.0) * row
    if HAS_BESIDE:
        width = H
        if ONLY_OWN:
            width = tl.where(tl.load(places + t * K + K - 1) < 0, H, 0)
        total += tl.load(beside + t.to(tl.int64) * H + n, mask=n < width, other=0.0).to(tl.float32)
    tl.store(out + t.to(tl.int64) * H + n, total.to(out.dtype.element_ty), mask=n < H)


def _gate_up_constants(
    blocks: Blocks, hidden: int, inner: int, top_k: int, tile: int, act: int, alpha: float, limit: float,
    transposed: bool, interleaved: bool, has_bias: bool, by_tma: bool,
) -> dict[str, int | float]:  # fmt: skip
    return dict(H=hidden, I=inner, K=top_k, ACT=act, ALPHA=alpha, LIMIT=limit, HAS_BIAS=has_bias,
                TRANSPOSED=transposed, INTERLEAVED=interleaved, TMA=by_tma, TILE=tile, BN=blocks.columns,
                BK=blocks.depth, GROUP=blocks.group)  # fmt: skip


def _down_constants(
    blocks: Blocks, hidden: int, inner: int, tile: int, transposed: bool, has_bias: bool, by_tma: bool
) -> dict[str, int | float]:
    return dict(H=hidden, I=inner, HAS_BIAS=has_bias, TRANSPOSED=transposed, TMA=by_tma, TILE=tile,
                BN=blocks.columns, BK=blocks.depth, GROUP=blocks.group)  # fmt: skip


def _has_descriptor(stack: Tensor, layout: Layout) -> bool:
    """Whether descriptors can tell where a stack's matrices lie."""
    row_bytes = stack.shape[2] * stack.itemsize
    return layout == Layout() and stack.is_contiguous() and row_bytes % 16 == 0 and stack.data_ptr() % 16 == 0


def _new_gate_up(x: Tensor, pairs: Tensor, columns: int, act: int) -> Tensor:
    """Products stay as they were summed, so that the activation reads what it reads where it is computed at once."""
    if act >= 0:
        return x.new_empty(pairs.shape[0], columns // 2)
    return x.new_empty(pairs.shape[0], columns, dtype=torch.float32)


@launch("expert_gate_up")
def _gate_up(
    x: Tensor, stack: Tensor, bias: Tensor | None, pairs: Tensor, tiles: Tensor, num_tiles: Tensor, top_k: int,
    tile: int, act: int, alpha: float, limit: float, transposed: bool, interleaved: bool,
) -> Tensor:  # fmt: skip
    inner = stack.shape[2 if transposed else 1] // 2
    h = _new_gate_up(x, pairs, 2 * inner, act)
    hidden, chip = x.shape[1], chip_of(x.device)
    blocks = size_on(chip, GATE_UP, (x.itemsize, tile))
    by_tma = blocks.by_tma and _has_descriptor(stack, Layout(transposed, interleaved))
    constants = _gate_up_constants(blocks, hidden, inner, top_k, tile, act, alpha, limit, transposed, interleaved,
                                   bias is not None, by_tma)  # fmt: skip
    weights: Any = stack
    if by_tma:
        halves = stack.view(-1, 2, inner, hidden)
        weights = TensorDescriptor.from_tensor(halves, [1, 2, blocks.columns, blocks.depth])
    # an argument that is not read still needs a pointer
    gate_up_kernel[(_programs(chip, tiles, inner, blocks),)](
        x, weights, stack.stride(0), x if bias is None else bias, h, Tiles(tiles, num_tiles, pairs), **constants,
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


@launch("expert_down")
def _down(
    h: Tensor, stack: Tensor, bias: Tensor | None, pairs: Tensor, tiles: Tensor, num_tiles: Tensor, tile: int,
    transposed: bool,
) -> Tensor:  # fmt: skip
    hidden = stack.shape[2 if transposed else 1]
    out = h.new_empty(h.shape[0], hidden)
    chip = chip_of(h.device)
    blocks = size_on(chip, DOWN, (h.itemsize, tile))
    by_tma = blocks.by_tma and _has_descriptor(stack, Layout(transposed))
    constants = _down_constants(blocks, hidden, h.shape[1], tile, transposed, bias is not None, by_tma)
    weights = TensorDescriptor.from_tensor(stack, [1, blocks.columns, blocks.depth]) if by_tma else stack
    down_kernel[(_programs(chip, tiles, hidden, blocks),)](
        h, weights, stack.stride(0), h if bias is None else bias, out, Tiles(tiles, num_tiles, pairs), **constants,
        num_warps=blocks.num_warps, num_stages=stages(blocks.num_stages),
    )  # fmt: skip
    return out


@_down.register_fake
def _(
    h: Tensor, stack: Tensor, bias: Tensor | None, pairs: Tensor, tiles: Tensor, num_tiles: Tensor, tile: int,
    transposed: bool,
) -> Tensor:  # fmt: skip
    return h.new_empty(h.shape[0], stack.shape[2 if transposed else 1])


@launch("expert_combine")
def _combine(
    rows: Tensor, weights: Tensor, places: Tensor, beside: Tensor | None = None, only_own: bool = False
) -> Tensor:
    tokens, top_k = weights.shape
    hidden = rows.shape[1]
    out = rows.new_empty(tokens, hidden)
    constants = _combine_constants(hidden, top_k, beside is not None, only_own)
    combine_kernel[(tokens, triton.cdiv(hidden, constants["BH"]))](
        rows, weights, places, rows if beside is None else beside, out, **constants
    )
    return out


def _combine_constants(hidden: int, top_k: int, has_beside: bool, only_own: bool) -> dict[str, int]:
    return dict(H=hidden, K=top_k, BH=min(_COMBINE_COLUMNS, triton.next_power_of_2(hidden)), HAS_BESIDE=has_beside,
                ONLY_OWN=only_own)  # fmt: skip


@_combine.register_fake
def _(rows: Tensor, weights: Tensor, places: Tensor, *_: object) -> Tensor:
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


def combine(rows: Tensor, routed: Routed, beside: Tensor | None = None, only_own: bool = False) -> Tensor:
    """As in reference.py."""
    return _combine(rows, routed.weights, routed.places, beside, only_own)


def _programs(chip: Chip, tiles: Tensor, columns: int, blocks: Blocks) -> int:
    """As many as run at once, unless there cannot be so much work."""
    return min(tiles.shape[0] * triton.cdiv(columns, blocks.columns), blocks.programs * chip.multiprocessors)


# (name, hidden, inner, choices of a token, activation, layout, bias, element) of what is compiled ahead of time
_SHAPES = (
    ("v2-lite", 2048, 1408, 8, Activation(), Layout(), False, "bf16"),
    ("v2-lite fp32", 2048, 1408, 8, Activation(), Layout(), False, "fp32"),
    ("qwen3", 2048, 768, 8, Activation(), Layout(), False, "bf16"),
    ("gpt-oss", 2880, 2880, 4, Activation(Act.CLAMPED, 1.702, 7.0), Layout(True, True), True, "bf16"),
)


def configurations() -> Iterator[Configuration]:
    """DeepSeek-V2-Lite in bfloat16 (all tiles) and float32, Qwen3-30B-A3B, gpt-oss.

    Without an activation only V2-Lite and gpt-oss, which differ in what they store.
    """
    for target, shape, tile in product((*NVIDIA, *AMD), _SHAPES, TILE_ROWS):
        yield from _configurations(target, *shape, tile)
    types = dict(rows="*bf16:16", weights="*fp32:16", places="*i32:16", beside="*bf16:16", out="*bf16:16")
    yield Configuration("combine v2-lite", combine_kernel, types, _combine_constants(2048, 8, False, False))
    yield Configuration("combine v2-lite beside", combine_kernel, types, _combine_constants(2048, 8, True, True))
    yield from activation_kernel.configurations()


def _configurations(
    target: str, name: str, hidden: int, inner: int, top_k: int, activation: Activation, layout: Layout,
    has_bias: bool, element: str, tile: int,
) -> Iterator[Configuration]:  # fmt: skip
    title, chip, key = f"{name} tile {tile}", Chip(target), (2 if element == "bf16" else 4, tile)
    types = {pointer: f"*{element}:16" for pointer in ("x", "h", "stack", "bias", "out")}
    types |= {"stride": "i32:16", "tiles": Tiles("*i32:16", "*i32:16", "*i32:16")}
    ways: list[tuple[str, Activation | None]] = [(f"gate_up {title}", activation)]
    if name in ("v2-lite", "gpt-oss"):
        ways.append((f"gate_up {title} without activation", None))
    blocks = size_on(chip, GATE_UP, key)
    by_tma = blocks.by_tma and layout == Layout()
    its = {"stack": f"tensordesc<{element}[1, 2, {blocks.columns}, {blocks.depth}]>"} if by_tma else {}
    for way, wanted in ways:
        constants = _gate_up_constants(blocks, hidden, inner, top_k, tile, *_numbers(wanted), layout.transposed,
                                       layout.interleaved, has_bias, by_tma)  # fmt: skip
        own = types | its if wanted is not None else types | its | {"h": "*fp32:16"}
        yield Configuration(way, gate_up_kernel, own, constants, blocks.num_warps, blocks.num_stages, (target,))
    blocks = size_on(chip, DOWN, key)
    by_tma = blocks.by_tma and not layout.transposed
    constants = _down_constants(blocks, hidden, inner, tile, layout.transposed, has_bias, by_tma)
    its = {"stack": f"tensordesc<{element}[1, {blocks.columns}, {blocks.depth}]>"} if by_tma else {}
    yield Configuration(f"down {title}", down_kernel, types | its, constants, blocks.num_warps, blocks.num_stages,
                        (target,))  # fmt: skip
