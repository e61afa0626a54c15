"""Triton form of rope_store: rows of one or several heads at a time, each in registers from the product to the cache.

Without adapters a program takes some heads of one token. With LoRA, whose delta is added on the way, it takes tiles of
an adapter's rows, one head at a time: an item is (tile, head), and program p takes items p, p + P, p + 2P, ...
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration
from kernels.compiled.launch import launch
from kernels.lora.delta import Delta
from kernels.lora.pending.kernel import configured, constants_of, pending_of, programs, types_of
from kernels.lora.products.kernel import adapted, tile_of
from kernels.rope_store.heads import HeadNorms, Heads

_HEADS = 8  # heads a program, without adapters


class Cache(NamedTuple):
    """Keys or values, [blocks, BLOCK_SIZE, heads, width], and the strides of the first three dimensions."""

    data: Any
    block_stride: Any
    offset_stride: Any
    head_stride: Any


class Norms(NamedTuple):
    """As HeadNorms; read if HAS_NORMS."""

    query: Any
    key: Any
    eps: Any
    offset: Any


class Turns(NamedTuple):
    """Cosines and sines of a token at token * stride."""

    cos: Any
    sin: Any
    stride: Any


@triton.jit
def _elements(
    source, c, mask, pending, slot, part, at, tokens, present, T, max_rank,
    DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, SL: tl.constexpr, SPLITS: tl.constexpr, RB: tl.constexpr,
    DT: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """[ROWS, BN] float32: elements c of the heads that begin at `source` [ROWS], with what adapters add. at: the first
    column of the head in its slice `part`."""
    values = tl.load(source[:, None] + c[None, :], mask=present[:, None] & mask[None, :], other=0.0).to(tl.float32)
    if DELTA:
        values = adapted(values, pending, slot, part, tokens, present, at + c, mask, T, max_rank,
                         HAS_BIAS, SL, SPLITS, ROWS, BN, RB, DT)  # fmt: skip
    return values


@triton.jit
def _normed(x, inverse, weight, c, mask, offset, CAST_FIRST: tl.constexpr, E: tl.constexpr):
    """Elements c of heads, rounded as rms_norm's result is."""
    x = x * inverse[:, None]
    if CAST_FIRST:
        x = x.to(E).to(tl.float32)
    scale = tl.load(weight + c, mask=mask, other=0.0).to(tl.float32) + offset
    return (x * scale[None, :]).to(E).to(tl.float32)


@triton.jit
def _turn(
    source, target, present, written, weight, eps, offset, turns, pending, slot, part, at, tokens, T, max_rank,
    D: tl.constexpr, ROTATED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HAS_NORMS: tl.constexpr,
    CAST_FIRST: tl.constexpr, DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, SL: tl.constexpr, SPLITS: tl.constexpr,
    RB: tl.constexpr, DT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Heads of queries or keys that begin at `source` [ROWS] go to `target` [ROWS] where `written`."""
    E: tl.constexpr = source.dtype.element_ty
    P: tl.constexpr = ROTATED // 2
    half = tl.arange(0, HALF)
    if DELTA:  # both halves at once, parted in registers: what adapters left is read once for both
        both = tl.arange(0, 2 * HALF)
        c = both % HALF + both // HALF * P
        ab = _elements(source, c, both % HALF < P, pending, slot, part, at, tokens, present, T, max_rank,
                       DELTA, HAS_BIAS, SL, SPLITS, RB, DT, ROWS, 2 * HALF)  # fmt: skip
        a, b = tl.split(tl.permute(tl.reshape(ab, (ROWS, 2, HALF)), (0, 2, 1)))
    else:
        a = _elements(source, half, half < P, pending, slot, part, at, tokens, present, T, max_rank,
                      DELTA, HAS_BIAS, SL, SPLITS, RB, DT, ROWS, HALF)  # fmt: skip
        b = _elements(source, P + half, half < P, pending, slot, part, at, tokens, present, T, max_rank,
                      DELTA, HAS_BIAS, SL, SPLITS, RB, DT, ROWS, HALF)  # fmt: skip
    if REST > 0:
        left = ROTATED + tl.arange(0, REST)
        rest = _elements(source, left, left < D, pending, slot, part, at, tokens, present, T, max_rank,
                         DELTA, HAS_BIAS, SL, SPLITS, RB, DT, ROWS, REST)  # fmt: skip
    if HAS_NORMS:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if REST > 0:
            squares += tl.sum(rest * rest, 1)
        inverse = tl.rsqrt(squares / D + eps)
        a = _normed(a, inverse, weight, half, half < P, offset, CAST_FIRST, E)
        b = _normed(b, inverse, weight, P + half, half < P, offset, CAST_FIRST, E)
        if REST > 0:
            rest = _normed(rest, inverse, weight, left, left < D, offset, CAST_FIRST, E)
    turn_at = tokens[:, None] * turns.stride + half[None, :]
    mask = present[:, None] & (half < P)[None, :]
    cos = tl.load(turns.cos + turn_at, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(turns.sin + turn_at, mask=mask, other=0.0).to(tl.float32)
    mask = written[:, None] & (half < P)[None, :]
    tl.store(target[:, None] + half[None, :], (a * cos - b * sin).to(E), mask=mask)
    tl.store(target[:, None] + (P + half)[None, :], (b * cos + a * sin).to(E), mask=mask)
    if REST > 0:
        tl.store(target[:, None] + left[None, :], rest.to(E), mask=written[:, None] & (left < D)[None, :])


@triton.jit
def _cache_rows(cache, kv_slots, heads, BLOCK_SIZE: tl.constexpr):
    """Pointers to heads at KV slots; anything where those are negative."""
    block = kv_slots // BLOCK_SIZE
    at = block * cache.block_stride + (kv_slots % BLOCK_SIZE) * cache.offset_stride
    return cache.data + at + heads * cache.head_stride


@triton.jit
def _heads(
    y, stride, out, keys, values, slot_mapping, turns, norms, pending, slot, tokens, head, present, kind,
    T, max_rank, HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROTATED: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_NORMS: tl.constexpr,
    CAST_FIRST: tl.constexpr, DELTA: tl.constexpr, HAS_BIAS: tl.constexpr, SL: tl.constexpr, SPLITS: tl.constexpr,
    RB: tl.constexpr, DT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Heads of the tokens [ROWS], all of one kind: 0 queries, 1 keys, 2 values. head: of each row; with DELTA a number,
    of all rows."""
    row = y + tokens * stride
    kv_slots = tl.load(slot_mapping + tokens, mask=present, other=-1).to(tl.int64)
    written = present & (kv_slots >= 0)
    if kind == 2:
        c = tl.arange(0, VALUE)
        value = _elements(row + (HQ + HK) * D + head * DV, c, c < DV, pending, slot, 2, head * DV, tokens, written, T,
                          max_rank, DELTA, HAS_BIAS, SL, SPLITS, RB, DT, ROWS, VALUE)  # fmt: skip
        target = _cache_rows(values, kv_slots, head, BLOCK_SIZE)
        tl.store(target[:, None] + c[None, :], value.to(target.dtype.element_ty),
                 mask=written[:, None] & (c < DV)[None, :])  # fmt: skip
    else:
        weight = norms.query
        target = out + (tokens * HQ + head) * D
        if kind == 1:
            weight = norms.key
            target = _cache_rows(keys, kv_slots, head, BLOCK_SIZE)
        else:
            written = present
        _turn(row + kind * HQ * D + head * D, target, present, written, weight, norms.eps, norms.offset, turns, pending,
              slot, kind, head * D, tokens, T, max_rank, D, ROTATED, HALF, REST, HAS_NORMS, CAST_FIRST,
              DELTA, HAS_BIAS, SL, SPLITS, RB, DT, ROWS)  # fmt: skip


@triton.jit
def rope_store_kernel(
    y, stride, out, keys, values, slot_mapping, turns, norms,  # [T, ..], its rows' distance, [T, HQ, D], Cache, Cache
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROTATED: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_NORMS: tl.constexpr,
    CAST_FIRST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Programs: (token, some heads), those of queries first, then of keys, then of values."""
    group = tl.program_id(1)
    Q: tl.constexpr = (HQ + HEADS - 1) // HEADS
    K: tl.constexpr = (HK + HEADS - 1) // HEADS
    kind = 0
    first = group
    most = HQ
    if group >= Q:
        kind = 1 + (group - Q) // K
        first = (group - Q) % K
        most = HK
    head = first * HEADS + tl.arange(0, HEADS)
    tokens = tl.program_id(0).to(tl.int64) + tl.zeros((HEADS,), tl.int64)
    _heads(y, stride, out, keys, values, slot_mapping, turns, norms, y, 0, tokens, head, head < most, kind, 0, 0,
           HQ, HK, D, DV, ROTATED, HALF, REST, VALUE, BLOCK_SIZE, HAS_NORMS, CAST_FIRST, False, False, 1, 1, 1,
           tl.float32, HEADS)  # fmt: skip


@triton.jit(do_not_specialize=["T", "max_rank"])
def adapted_kernel(
    y, stride, out, keys, values, slot_mapping, turns, norms, pending, T, max_rank,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROTATED: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, VALUE: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_NORMS: tl.constexpr,
    CAST_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr, SL: tl.constexpr, SPLITS: tl.constexpr, RB: tl.constexpr,
    DT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The same of a product that lacks what adapters add (Pending)."""
    HEADS: tl.constexpr = HQ + 2 * HK
    for item in range(tl.program_id(0), tl.load(pending.num_tiles) * HEADS, tl.num_programs(0)):
        slot, tokens, present = tile_of(pending, item // HEADS, TILE)
        column = item % HEADS
        kind = 0
        head = column
        if column >= HQ:
            kind = 1 + (column - HQ) // HK
            head = (column - HQ) % HK
        _heads(y, stride, out, keys, values, slot_mapping, turns, norms, pending, slot, tokens, head, present, kind,
               T, max_rank, HQ, HK, D, DV, ROTATED, HALF, REST, VALUE, BLOCK_SIZE, HAS_NORMS, CAST_FIRST, True,
               HAS_BIAS, SL, SPLITS, RB, DT, TILE)  # fmt: skip


def _constants(heads: Heads, block_size: int, norms: HeadNorms | None) -> dict[str, Any]:
    rest = heads.dim - heads.rotated
    return dict(
        HQ=heads.query, HK=heads.kv, D=heads.dim, DV=heads.value_dim, ROTATED=heads.rotated,
        HALF=_padded(heads.rotated // 2), REST=_padded(rest) if rest else 0, VALUE=_padded(heads.value_dim),
        BLOCK_SIZE=block_size, HAS_NORMS=norms is not None, CAST_FIRST=norms is None or norms.cast_first,
    )  # fmt: skip


def _padded(width: int) -> int:
    """Of a matrix instruction's at least."""
    return max(16, triton.next_power_of_2(width))


def _arguments(
    qkv: Tensor, out: Tensor, cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor,
    norms: HeadNorms | None,
) -> tuple[Any, ...]:  # fmt: skip
    """What both kernels begin with."""
    keys, values = (Cache(it, *it.stride()[:3]) for it in (key_cache, value_cache))
    unread = Norms(qkv, qkv, 0.0, 0.0)  # an argument that is not read still needs a pointer
    return (qkv, qkv.stride(0), out, keys, values, slot_mapping, Turns(cos, sin, cos.stride(1)),
            unread if norms is None else Norms(*norms[:4]))  # fmt: skip


def _check(qkv: Tensor, heads: Heads, cos: Tensor, sin: Tensor, caches: tuple[Tensor, Tensor]) -> None:
    assert qkv.dim() == 2 and qkv.shape[1] == sum(heads.widths) and qkv.stride(1) == 1
    assert heads.rotated % 2 == 0 and 0 < heads.rotated <= heads.dim
    assert cos.shape[:2] == (1, len(qkv)) and cos.shape[2] >= heads.rotated // 2
    assert cos.stride() == sin.stride() and cos.stride(2) == 1
    assert all(it.stride(-1) == 1 and it.dtype == qkv.dtype for it in caches)


def _norms_of(query: Tensor | None, key: Tensor | None, eps: float, offset: float, cast: bool) -> HeadNorms | None:
    return None if query is None or key is None else HeadNorms(query, key, eps, offset, cast)


@launch("rope_store", mutates_args=("key_cache", "value_cache"))
def _rope_store(
    qkv: Tensor, heads: Sequence[int], cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor,
    slot_mapping: Tensor, query_norm: Tensor | None, key_norm: Tensor | None, eps: float, offset: float,
    cast_first: bool,
) -> Tensor:  # fmt: skip
    it, norms = Heads(*heads), _norms_of(query_norm, key_norm, eps, offset, cast_first)
    _check(qkv, it, cos, sin, (key_cache, value_cache))
    out = qkv.new_empty(len(qkv), it.query, it.dim)
    if len(qkv):
        groups = triton.cdiv(it.query, _HEADS) + 2 * triton.cdiv(it.kv, _HEADS)
        rope_store_kernel[(len(qkv), groups)](
            *_arguments(qkv, out, cos, sin, key_cache, value_cache, slot_mapping, norms),
            **_constants(it, key_cache.shape[1], norms), HEADS=_HEADS, num_warps=_warps(it),
        )  # fmt: skip
    return out


@launch("rope_store_adapted", mutates_args=("key_cache", "value_cache"))
def _rope_store_adapted(
    qkv: Tensor, heads: Sequence[int], cos: Tensor, sin: Tensor, key_cache: Tensor, value_cache: Tensor,
    slot_mapping: Tensor, query_norm: Tensor | None, key_norm: Tensor | None, eps: float, offset: float,
    cast_first: bool, z: Tensor, table: Tensor, offsets: Tensor, bias: Tensor | None, tiles: Tensor, num_tiles: Tensor,
) -> Tensor:  # fmt: skip
    it, norms = Heads(*heads), _norms_of(query_norm, key_norm, eps, offset, cast_first)
    _check(qkv, it, cos, sin, (key_cache, value_cache))
    assert z.shape[1] == 3
    out = qkv.new_empty(len(qkv), it.query, it.dim)
    if len(qkv):
        adapted_kernel[(programs(len(tiles) * (it.query + 2 * it.kv), qkv),)](
            *_arguments(qkv, out, cos, sin, key_cache, value_cache, slot_mapping, norms),
            pending_of(z, table, offsets, bias, tiles, num_tiles, qkv), len(qkv), z.shape[3],
            **_constants(it, key_cache.shape[1], norms), **constants_of(z.shape[0], 3, qkv.dtype, bias is not None),
            num_warps=_adapted_warps(it, qkv.itemsize), num_stages=1,
        )  # fmt: skip
    return out


@_rope_store.register_fake
@_rope_store_adapted.register_fake
def _(qkv: Tensor, heads: Sequence[int], *_: object) -> Tensor:
    it = Heads(*heads)
    return qkv.new_empty(len(qkv), it.query, it.dim)


def _warps(heads: Heads) -> int:
    return min(4, max(1, _padded(heads.rotated // 2) // 32))


def _adapted_warps(heads: Heads, itemsize: int) -> int:
    return 8 if _padded(heads.dim) * itemsize > 128 else 4


def rope_store(
    qkv: Tensor,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    norms: HeadNorms | None = None,
    delta: Delta | None = None,
) -> Tensor:
    """As in reference.py, of a product that lacks the delta, if there is one."""
    none = (None, None, 0.0, 0.0, True)
    given = (qkv, list(heads), cos, sin, key_cache, value_cache, slot_mapping, *(none if norms is None else norms))
    if delta is None:
        return _rope_store(*given)
    return _rope_store_adapted(*given, *delta.tensors)


# (name, heads, norms, element, depth of the product if adapters act on it)
_SHAPES = (
    ("llama", Heads(32, 8, 128, 128, 128), False, "bf16", 4096),
    ("llama fp32", Heads(32, 8, 128, 128, 128), False, "fp32", 4096),
    ("qwen3", Heads(32, 8, 128, 128, 128), True, "bf16", 4096),
    ("gpt-oss", Heads(64, 8, 64, 64, 64), False, "bf16", 2880),
    ("glm4 moe", Heads(96, 8, 128, 128, 64), True, "bf16", 4096),
    ("gemma3", Heads(8, 4, 256, 256, 256), True, "bf16", 2560),
)


def configurations() -> Iterator[Configuration]:
    """Plain, with norms, with a part of each head rotated, and with adapters."""
    for name, heads, has_norms, element, depth in _SHAPES:
        pointer = f"*{element}:16"
        cache = Cache(pointer, *["i32:16"] * 3)
        types = dict(
            y=pointer, stride="i32:16", out=pointer, keys=cache, values=cache, slot_mapping="*i32:16",
            turns=Turns(pointer, pointer, "i32:16"), norms=Norms(pointer, pointer, "fp32", "fp32"),
        )  # fmt: skip
        empty = torch.empty(0)
        constants = _constants(heads, 16, HeadNorms(empty, empty, 0.0, 0.0, name != "gemma3") if has_norms else None)
        yield Configuration(name, rope_store_kernel, types, constants | {"HEADS": _HEADS}, _warps(heads))
        types |= dict(pending=types_of(element), T="i32", max_rank="i32")
        constants |= configured(depth, 3, element)
        warps = _adapted_warps(heads, 2 if element == "bf16" else 4)
        yield Configuration(f"{name} adapted", adapted_kernel, types, constants, warps, num_stages=1)
