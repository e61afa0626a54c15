"""Triton form of grouped_gemm: persistent programs walk the tiles that expert_route opened.

A tile is up to TILE rows of one expert place; its rows are gathered on load and scattered on store, so nothing is
sorted or padded in memory. At decode the weights' bytes are the cost: the only rule for tile sizes is to read each
matrix once. A stack is addressed by stride: it may be an arena with holes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration, dot, stages
from kernels.expert_route import Routed
from kernels.grouped_gemm.layout import Act, Activation, Layout


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
_ACTIVATE_COLUMNS = 512
_NO_ACT = -1  # in place of an Act: products as they are


def tile_rows(num_pairs: int, num_experts: int) -> int:
    """Twice the mean rows of an expert, as a power of two between 16 (a matrix instruction's) and 64."""
    return min(64, max(16, triton.next_power_of_2(2 * num_pairs // num_experts)))


@triton.jit
def _gelu_tanh(x):
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return 0.5 * x * (2 * tl.sigmoid(2 * inner))  # 1 + tanh(z) = 2 sigmoid(2 z)


@triton.jit
def _act(gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    if ACT == 0:
        return gate * tl.sigmoid(gate) * up
    elif ACT == 1:
        return _gelu_tanh(gate) * up
    elif ACT == 2:
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    else:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        return (up + 1.0) * gate * tl.sigmoid(gate * ALPHA)


@triton.jit
def _offsets(row, k, DEPTH: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Of elements (row, k) of a matrix [ROWS, DEPTH], or [DEPTH, ROWS] if transposed; as [k, row]."""
    if TRANSPOSED:
        return k[:, None] * ROWS + row[None, :]
    else:
        return row[None, :] * DEPTH + k[:, None]


@triton.jit
def gate_up_kernel(
    x, stack, bias, h, pairs, tiles, num_tiles, stride,
    H: tl.constexpr, I: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr, TRANSPOSED: tl.constexpr, INTERLEAVED: tl.constexpr, TILE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """h[position] = act(gate) * up for each position of a tile; x [T, H], stack [places, 2I, H], h [P, I].

    ACT below 0: h [P, 2I] holds gate and up in the order of the matrix's rows.
    """
    column_blocks: tl.constexpr = (I + BN - 1) // BN
    for work in range(tl.program_id(0), tl.load(num_tiles) * column_blocks, tl.num_programs(0)):
        tile = work // column_blocks
        place = tl.load(tiles + tile * 3)
        start = tl.load(tiles + tile * 3 + 1)
        m = tl.arange(0, TILE)
        row_mask = m < tl.load(tiles + tile * 3 + 2)
        token = tl.load(pairs + start + m, mask=row_mask, other=0) // K
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
            out = _act(gate, up, ACT, ALPHA, LIMIT)
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
def activate_kernel(
    products, places, h,
    I: tl.constexpr, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, INTERLEAVED: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """h[position] = act(gate) * up; products [P, 2I], h [P, I].

    Padding tokens are the last of a batch, so as many positions hold a real pair as leading entries of places do.
    """
    position = tl.program_id(0)
    if tl.load(places + position) >= 0:
        row = products + position.to(tl.int64) * (2 * I)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        if INTERLEAVED:
            both_at = tl.program_id(1) * (2 * BN) + tl.arange(0, 2 * BN)
            both = tl.load(row + both_at, mask=both_at < 2 * I, other=0.0).to(tl.float32)
            gate, up = tl.split(tl.reshape(both, (BN, 2)))
        else:
            gate = tl.load(row + n, mask=n < I, other=0.0).to(tl.float32)
            up = tl.load(row + I + n, mask=n < I, other=0.0).to(tl.float32)
        out = _act(gate, up, ACT, ALPHA, LIMIT)
        tl.store(h + position.to(tl.int64) * I + n, out.to(h.dtype.element_ty), mask=n < I)


@triton.jit
def down_kernel(
    h, stack, bias, out, pairs, tiles, num_tiles, stride,
    H: tl.constexpr, I: tl.constexpr, HAS_BIAS: tl.constexpr, TRANSPOSED: tl.constexpr, TILE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out[pair] = stack[place] @ h[position]; h [P, I], stack [places, H, I], out [P, H] in order of pair number."""
    column_blocks: tl.constexpr = (H + BN - 1) // BN
    for work in range(tl.program_id(0), tl.load(num_tiles) * column_blocks, tl.num_programs(0)):
        tile = work // column_blocks
        place = tl.load(tiles + tile * 3)
        start = tl.load(tiles + tile * 3 + 1)
        m = tl.arange(0, TILE)
        row_mask = m < tl.load(tiles + tile * 3 + 2)
        pair = tl.load(pairs + start + m, mask=row_mask, other=0)
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


@torch.library.custom_op("heddle::expert_gate_up", mutates_args=())
def _gate_up(
    x: Tensor, stack: Tensor, bias: Tensor | None, pairs: Tensor, tiles: Tensor, num_tiles: Tensor, top_k: int,
    tile: int, act: int, alpha: float, limit: float, transposed: bool, interleaved: bool,
) -> Tensor:  # fmt: skip
    hidden = x.shape[1]
    inner = stack.shape[2 if transposed else 1] // 2
    h = x.new_empty(pairs.shape[0], inner if act >= 0 else 2 * inner)
    blocks = _for_size(_GATE_UP[tile], x.itemsize)
    gate_up_kernel[(_programs(x, tiles, inner, blocks),)](
        x, stack, x if bias is None else bias, h, pairs, tiles, num_tiles, stack.stride(0), H=hidden, I=inner, K=top_k,
        ACT=act, ALPHA=alpha, LIMIT=limit, HAS_BIAS=bias is not None, TRANSPOSED=transposed, INTERLEAVED=interleaved,
        TILE=tile, BN=blocks.columns, BK=blocks.depth, num_warps=blocks.num_warps,
        num_stages=stages(blocks.num_stages),
    )  # fmt: skip
    return h


@_gate_up.register_fake
def _(
    x: Tensor, stack: Tensor, bias: Tensor | None, pairs: Tensor, tiles: Tensor, num_tiles: Tensor, top_k: int,
    tile: int, act: int, alpha: float, limit: float, transposed: bool, interleaved: bool,
) -> Tensor:  # fmt: skip
    columns = stack.shape[2 if transposed else 1]
    return x.new_empty(pairs.shape[0], columns // 2 if act >= 0 else columns)


@torch.library.custom_op("heddle::expert_activate", mutates_args=())
def _activate(products: Tensor, places: Tensor, act: int, alpha: float, limit: float, interleaved: bool) -> Tensor:
    inner = products.shape[1] // 2
    h = products.new_empty(products.shape[0], inner)
    columns = min(_ACTIVATE_COLUMNS, triton.next_power_of_2(inner))
    activate_kernel[(products.shape[0], triton.cdiv(inner, columns))](
        products, places, h, I=inner, ACT=act, ALPHA=alpha, LIMIT=limit, INTERLEAVED=interleaved, BN=columns
    )
    return h


@_activate.register_fake
def _(products: Tensor, places: Tensor, act: int, alpha: float, limit: float, interleaved: bool) -> Tensor:
    return products.new_empty(products.shape[0], products.shape[1] // 2)


@torch.library.custom_op("heddle::expert_down", mutates_args=())
def _down(
    h: Tensor, stack: Tensor, bias: Tensor | None, pairs: Tensor, tiles: Tensor, num_tiles: Tensor, tile: int,
    transposed: bool,
) -> Tensor:  # fmt: skip
    hidden = stack.shape[2 if transposed else 1]
    out = h.new_empty(h.shape[0], hidden)
    blocks = _for_size(_DOWN[tile], h.itemsize)
    down_kernel[(_programs(h, tiles, hidden, blocks),)](
        h, stack, h if bias is None else bias, out, pairs, tiles, num_tiles, stack.stride(0), H=hidden, I=h.shape[1],
        HAS_BIAS=bias is not None, TRANSPOSED=transposed, TILE=tile, BN=blocks.columns, BK=blocks.depth,
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
    columns = min(_COMBINE_COLUMNS, triton.next_power_of_2(hidden))
    combine_kernel[(tokens, triton.cdiv(hidden, columns))](rows, weights, places, out, H=hidden, K=top_k, BH=columns)
    return out


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
    act = _NO_ACT if activation is None else int(activation.act)
    alpha, limit = (1.0, 0.0) if activation is None else (activation.alpha, activation.limit)
    return _gate_up(
        x.contiguous(), stack, bias, routed.pairs, routed.tiles, routed.num_tiles, routed.places.shape[1],
        routed.tile_rows, act, alpha, limit, layout.transposed, layout.interleaved,
    )  # fmt: skip


def activate(products: Tensor, activation: Activation, interleaved: bool, routed: Routed) -> Tensor:
    """As in reference.py."""
    return _activate(products, routed.places, int(activation.act), activation.alpha, activation.limit, interleaved)


def down(h: Tensor, stack: Tensor, routed: Routed, layout: Layout, bias: Tensor | None = None) -> Tensor:
    """As in reference.py."""
    return _down(h, stack, bias, routed.pairs, routed.tiles, routed.num_tiles, routed.tile_rows, layout.transposed)


def combine(rows: Tensor, routed: Routed) -> Tensor:
    """As in reference.py."""
    return _combine(rows, routed.weights, routed.places)


def _for_size(blocks: Blocks, itemsize: int) -> Blocks:
    """Elements of four bytes are multiplied without matrix instructions, which takes registers."""
    return blocks if itemsize < 4 else blocks._replace(depth=blocks.depth // 4, num_warps=8, num_stages=2)


def _programs(x: Tensor, tiles: Tensor, columns: int, blocks: Blocks) -> int:
    """Two programs a multiprocessor, unless there cannot be so much work."""
    return min(tiles.shape[0] * triton.cdiv(columns, blocks.columns), 2 * multiprocessors(x))


def multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def configurations() -> Iterator[Configuration]:
    """DeepSeek-V2-Lite in bfloat16 (all tiles) and float32, Qwen3-30B-A3B, gpt-oss.

    Without an activation only V2-Lite and gpt-oss, which differ in what they store.
    """
    shapes = {
        "v2-lite": (2048, 1408, 6, Act.SILU, Layout(), False, "*bf16"),
        "v2-lite fp32": (2048, 1408, 6, Act.SILU, Layout(), False, "*fp32"),
        "qwen3": (2048, 768, 8, Act.SILU, Layout(), False, "*bf16"),
        "gpt-oss": (2880, 2880, 4, Act.CLAMPED, Layout(True, True), True, "*bf16"),
    }
    for name, (hidden, inner, top_k, act, layout, has_bias, dtype) in shapes.items():
        for tile in _GATE_UP:
            title = f"{name} tile {tile}"
            yield _gate_up_configuration(title, hidden, inner, top_k, act, layout, has_bias, dtype, tile)
            yield _down_configuration(title, hidden, inner, layout, has_bias, dtype, tile)
            if name in ("v2-lite", "gpt-oss"):
                yield _gate_up_configuration(f"{name} tile {tile} without activation", hidden, inner, top_k, None,
                                             layout, has_bias, dtype, tile)  # fmt: skip
        if name in ("v2-lite", "gpt-oss"):
            constants = dict(I=inner, ACT=int(act), ALPHA=1.702, LIMIT=7.0, INTERLEAVED=layout.interleaved,
                             BN=_ACTIVATE_COLUMNS)  # fmt: skip
            types = dict(products=dtype, places="*i32", h=dtype)
            yield Configuration(f"activate {name}", activate_kernel, types, constants, ("products", "h"))
    types = dict(rows="*bf16", weights="*fp32", places="*i32", out="*bf16")
    yield Configuration("combine v2-lite", combine_kernel, types, dict(H=2048, K=6, BH=1024), ("rows", "out"))


_INDICES = dict(pairs="*i32", tiles="*i32", num_tiles="*i32", stride="i32")


def _gate_up_configuration(
    title: str, hidden: int, inner: int, top_k: int, act: Act | None, layout: Layout, has_bias: bool, dtype: str,
    tile: int,
) -> Configuration:  # fmt: skip
    blocks = _for_size(_GATE_UP[tile], 2 if dtype == "*bf16" else 4)
    types = {**_INDICES, "x": dtype, "stack": dtype, "bias": dtype, "h": dtype}
    number = _NO_ACT if act is None else int(act)
    constants = dict(H=hidden, I=inner, K=top_k, ACT=number, ALPHA=1.702, LIMIT=7.0, HAS_BIAS=has_bias,
                     TRANSPOSED=layout.transposed, INTERLEAVED=layout.interleaved, TILE=tile,
                     BN=blocks.columns, BK=blocks.depth)  # fmt: skip
    aligned = ("x", "stack", "h", "stride")
    return Configuration(
        f"gate_up {title}", gate_up_kernel, types, constants, aligned, blocks.num_warps, blocks.num_stages
    )


def _down_configuration(
    title: str, hidden: int, inner: int, layout: Layout, has_bias: bool, dtype: str, tile: int
) -> Configuration:
    blocks = _for_size(_DOWN[tile], 2 if dtype == "*bf16" else 4)
    types = {**_INDICES, "h": dtype, "stack": dtype, "bias": dtype, "out": dtype}
    constants = dict(H=hidden, I=inner, HAS_BIAS=has_bias, TRANSPOSED=layout.transposed, TILE=tile,
                     BN=blocks.columns, BK=blocks.depth)  # fmt: skip
    aligned = ("h", "stack", "out", "stride")
    return Configuration(f"down {title}", down_kernel, types, constants, aligned, blocks.num_warps, blocks.num_stages)
