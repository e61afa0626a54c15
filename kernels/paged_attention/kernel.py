"""Triton form of paged_attention: prefill chunks and decodes of a batch in one launch.

A program computes one tile of scores. Its rows are some queries of one sequence times the query heads that share a key
head, so that a key is read once for all of them. The grid is made for the most tiles that the shapes allow; a program
finds its sequence by binary search over query_starts, as vLLM's unified attention does, and ends if there is none.

Keys that no query of the tile sees are not read: neither blocks outside of windows and chunks, nor the rest of a last
block, which may hold anything. Masked loads give zeros there, so no block needs to be cleared before its first use.

Where all sequences are decodes and they are few, the keys of each are split over programs (splits/). A program keeps
its part in scratch memory and counts itself as arrived; the last to arrive adds the parts up. No program waits for
another, so there is no deadlock however few of them run at once. Long decodes beside prefills get a launch of their own
for that.

Absorbed attention (MLA) has one key head, and its values are the leading columns of the keys: those are read once.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import AMD, NVIDIA, Configuration, dot
from kernels.paged_attention.batch import DeviceBatch
from kernels.paged_attention.splits.kernel import (
    LEAST_TILES,
    Parts,
    add_parts,
    num_splits,
    programs_wanted,
    scratch,
    store_part,
)
from kernels.paged_attention.tiles import Tile, choose_tile, split_dim

NO_LIMIT = 2**31 - 1
_LOG2E = tl.constexpr(1.4426950408889634)


class Rows(NamedTuple):
    """The query, [T, Hq, DIM], and its strides. In a kernel a pointer and integers; so are the next two."""

    data: Any
    stride: Any
    head_stride: Any


class Cache(NamedTuple):
    """Keys or values, [blocks, BLOCK_SIZE, Hkv, DIM or VALUE_DIM], and the strides of the first three dimensions."""

    data: Any
    block_stride: Any
    offset_stride: Any
    head_stride: Any


class Indices(NamedTuple):
    """Whose rows and keys are whose: as in DeviceBatch."""

    query_starts: Any
    kv_lens: Any
    block_tables: Any


@triton.jit
def _find_sequence(query_starts, tile, num_sequences, QUERIES: tl.constexpr):
    """The sequence of a query tile. Sequence s owns tiles from query_starts[s] // QUERIES + s on, which is enough."""
    low = 0
    high = num_sequences
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_starts + middle) // QUERIES + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def _load(rows, dims, present, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """[len(rows), PADDED] from pointers to rows of SIZE elements; zeros where not present."""
    if SIZE == PADDED:
        return tl.load(rows[:, None] + dims[None, :], mask=present[:, None], other=0.0)
    else:
        return tl.load(rows[:, None] + dims[None, :], mask=present[:, None] & (dims < SIZE)[None, :], other=0.0)


@triton.jit
def _write(out_rows, dims, present, accumulated, maximum, total, sinks, heads, VALUE_DIM: tl.constexpr,
           HAS_SINKS: tl.constexpr):  # fmt: skip
    """Normalise and store. A sink only adds to the total. Rows that saw no key become zero."""
    if HAS_SINKS:
        sink = tl.load(sinks + heads, mask=present, other=0.0).to(tl.float32) * _LOG2E
        highest = tl.maximum(maximum, sink)
        rescale = tl.exp2(maximum - highest)
        total = total * rescale + tl.exp2(sink - highest)
        accumulated = accumulated * rescale[:, None]
    result = accumulated / tl.where(total == 0.0, 1.0, total)[:, None]
    mask = present[:, None] & (dims < VALUE_DIM)[None, :]
    tl.store(out_rows[:, None] + dims[None, :], result.to(out_rows.dtype.element_ty), mask=mask)


@triton.jit
def _scaled(scores, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scores as powers of two: e^x = 2^(x * log2(e)). With tanh(x) = 1 - 2 / (e^2x + 1), for any x without overflow."""
    if HAS_SOFTCAP:
        return softcap * (1.0 - 2.0 / (tl.exp2(scores * (scale / softcap * 2.0 * _LOG2E)) + 1.0)) * _LOG2E
    else:
        return scores * (scale * _LOG2E)


@triton.jit(do_not_specialize=["num_sequences", "splits", "window", "chunk", "table_stride"])
def _attention(
    query, keys, values, out, indices, sinks, parts, counters,  # Rows, Cache, Cache, [T, Hq, VALUE_DIM], Indices, ...
    num_sequences, splits, scale, softcap, window, chunk, table_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, ROW_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DECODE: tl.constexpr, SPLIT: tl.constexpr, LIMITED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, LATENT: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Programs: (query tile, head tile), head tiles of a query tile next to each other; splits on axis 1.

    Row r of a tile is query r // ROW_HEADS and head r % ROW_HEADS. Keys have MAIN + TAIL elements, both powers of two,
    padded with zeros from DIM on. LATENT: a key's first MAIN elements are its value. counters [NUM_COUNTERS] int32.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HEAD_TILES: tl.constexpr = (GROUP + ROW_HEADS - 1) // ROW_HEADS
    QUERIES: tl.constexpr = BLOCK_M // ROW_HEADS
    program = tl.program_id(0)
    split = tl.program_id(1)
    tile = program // (KV_HEADS * HEAD_TILES)
    column = program % (KV_HEADS * HEAD_TILES)
    kv_head = column // HEAD_TILES

    # which queries of which sequence
    sequence = tile
    if not DECODE:
        sequence = _find_sequence(indices.query_starts, tile, num_sequences, QUERIES)
    first_row = tl.load(indices.query_starts + sequence)
    query_len = tl.load(indices.query_starts + sequence + 1) - first_row
    kv_len = tl.load(indices.kv_lens + sequence)
    first_query = 0
    if not DECODE:
        first_query = (tile - (first_row // QUERIES + sequence)) * QUERIES
    if first_query >= query_len:
        return
    if MIXED:  # decodes and the rest have a launch each
        if (query_len == 1) != DECODE:
            return
    rows = tl.arange(0, BLOCK_M)
    queries = first_query + rows // ROW_HEADS
    head_in_group = (column % HEAD_TILES) * ROW_HEADS + rows % ROW_HEADS
    heads = kv_head * GROUP + head_in_group
    present = (rows < QUERIES * ROW_HEADS) & (queries < query_len) & (head_in_group < GROUP)

    # which keys: [begin, end), of which this split takes its part
    context = kv_len - query_len
    positions = context + queries
    first_position = context + first_query
    end = tl.minimum(first_position + QUERIES, kv_len)
    begin = 0
    first_keys = tl.zeros((BLOCK_M,), tl.int32)
    if LIMITED:
        begin = tl.maximum(tl.maximum(first_position - window + 1, first_position // chunk * chunk), 0)
        first_keys = tl.maximum(positions - window + 1, positions // chunk * chunk)
    active = 1
    if SPLIT:
        # a part of fewer tiles is not worth its share of the adding up
        length = tl.maximum(tl.cdiv(tl.cdiv(tl.maximum(end - begin, 1), BLOCK_N), splits), LEAST_TILES) * BLOCK_N
        active = tl.maximum(tl.cdiv(end - begin, length), 1)
        begin += split * length
        end = tl.minimum(begin + length, end)
    if split >= active:
        return

    main = tl.arange(0, MAIN)
    dims = tl.arange(0, VALUE)
    query_rows = query.data + (first_row + queries).to(tl.int64) * query.stride + heads * query.head_stride
    query_main = _load(query_rows, main, present, DIM if DIM < MAIN else MAIN, MAIN)
    if TAIL:
        tail = MAIN + tl.arange(0, TAIL)
        query_tail = _load(query_rows, tail, present, DIM, MAIN + TAIL)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    accumulated = tl.zeros((BLOCK_M, VALUE), tl.float32)
    key_head = keys.data + kv_head.to(tl.int64) * keys.head_stride
    value_head = values.data + kv_head.to(tl.int64) * values.head_stride
    table = indices.block_tables + sequence.to(tl.int64) * table_stride
    first = begin + tl.arange(0, BLOCK_N)
    next_block = tl.load(table + first // BLOCK_SIZE, mask=first < end, other=0)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        seen = at < end
        block = next_block.to(tl.int64)
        next_at = at + BLOCK_N  # a tile ahead, so that the addresses of keys wait for no load
        next_block = tl.load(table + next_at // BLOCK_SIZE, mask=next_at < end, other=0)
        offset = at % BLOCK_SIZE
        key_rows = key_head + block * keys.block_stride + offset * keys.offset_stride
        key_main = _load(key_rows, main, seen, DIM if DIM < MAIN else MAIN, MAIN)
        scores = dot(query_main, tl.trans(key_main), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if TAIL:
            key_tail = _load(key_rows, tail, seen, DIM, MAIN + TAIL)
            scores = dot(query_tail, tl.trans(key_tail), scores)
        scores = _scaled(scores, scale, softcap, HAS_SOFTCAP)
        visible = seen[None, :]
        if not DECODE:
            visible = visible & (at[None, :] <= positions[:, None])
            if LIMITED:
                visible = visible & (at[None, :] >= first_keys[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        highest = tl.maximum(maximum, tl.max(scores, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)  # rows that have seen nothing yet
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        maximum = highest
        total = total * rescale + tl.sum(weights, 1)
        if LATENT:
            value = key_main
        else:
            value_rows = value_head + block * values.block_stride + offset * values.offset_stride
            value = _load(value_rows, dims, seen, VALUE_DIM, VALUE)
        accumulated = dot(weights.to(value.dtype), value, accumulated * rescale[:, None])

    out_rows = out + ((first_row + queries).to(tl.int64) * HEADS + heads) * VALUE_DIM
    if SPLIT and active > 1:
        store_part(parts, program * splits + split, rows, dims, accumulated, maximum, total, ROW_HEADS, VALUE)
        tl.debug_barrier()  # all threads have stored before one of them says so
        arrived = tl.atomic_add(counters + program, 1, sem="acq_rel")
        if arrived == active - 1:
            tl.store(counters + program, 0)
            accumulated, maximum, total = add_parts(
                parts, program * splits, active, rows, dims, ROW_HEADS, VALUE, BLOCK_M, 1 if LATENT else 4
            )
            _write(out_rows, dims, present, accumulated, maximum, total, sinks, heads, VALUE_DIM, HAS_SINKS)
    else:
        _write(out_rows, dims, present, accumulated, maximum, total, sinks, heads, VALUE_DIM, HAS_SINKS)


def _constants(
    heads: int, kv_heads: int, dim: int, value_dim: int, block_size: int, tile: Tile, latent: bool, decode: bool,
    split: bool, limited: bool = False, softcap: bool = False, sinks: bool = False, mixed: bool = False,
) -> dict[str, int | bool]:  # fmt: skip
    main, tail = split_dim(dim)
    return {
        "HEADS": heads, "KV_HEADS": kv_heads, "ROW_HEADS": min(heads // kv_heads, tile.block_m),
        "BLOCK_SIZE": block_size, "DIM": dim, "VALUE_DIM": value_dim, "MAIN": main, "TAIL": tail,
        "VALUE": max(16, triton.next_power_of_2(value_dim)), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "DECODE": decode, "SPLIT": split, "LIMITED": limited, "HAS_SOFTCAP": softcap, "HAS_SINKS": sinks,
        "LATENT": latent, "MIXED": mixed,
    }  # fmt: skip


def _is_latent(key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether values are the main part of the keys, in the same memory."""
    return (
        key_cache.shape[2] == 1
        and key_cache.data_ptr() == value_cache.data_ptr()
        and key_cache.stride() == value_cache.stride()
        and value_cache.shape[-1] == split_dim(key_cache.shape[-1])[0]
    )


class Limits(NamedTuple):
    """What becomes of scores, and who sees whom beyond causality; 0 for none."""

    scale: float
    window: int
    chunk: int
    softcap: float
    sinks: Tensor | None


@torch.library.custom_op("heddle::paged_attention", mutates_args=("counters",))
def _launch(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, query_starts: Tensor, kv_lens: Tensor, block_tables: Tensor,
    counters: Tensor, max_query_len: int, splits_decodes: bool, scale: float, window: int, chunk: int, softcap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """window, chunk, softcap: 0 for none."""
    out = query.new_empty(*query.shape[:2], value_cache.shape[-1])
    if not len(query) or not len(kv_lens):
        return out
    assert key_cache.stride(-1) == 1 and value_cache.stride(-1) == 1 and block_tables.stride(-1) == 1
    if query.stride(-1) != 1:
        query = query.contiguous()
    limits = Limits(scale, window, chunk, softcap, sinks)
    for most in (1, max_query_len) if splits_decodes else (max_query_len,):
        batch = DeviceBatch(query_starts, kv_lens, block_tables, counters, most, splits_decodes)
        _attend(query, key_cache, value_cache, out, batch, limits)
    return out


def _attend(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, out: Tensor, batch: DeviceBatch, limits: Limits
) -> None:
    """One launch. Where decodes have one of their own, it is for the decodes only, or for the others only.

    A decode's keys are split over programs. In the tiles of a prefill one program would walk all of them.
    """
    tokens, heads, dim = query.shape
    block_size, kv_heads = key_cache.shape[1:3]
    value_dim, count = value_cache.shape[-1], len(batch.kv_lens)
    decode = batch.max_query_len == 1
    tile = choose_tile(dim, batch.max_query_len * (heads // kv_heads), query.element_size())
    row_heads = min(heads // kv_heads, tile.block_m)
    query_tiles = count if decode else tokens // (tile.block_m // row_heads) + count
    programs = query_tiles * kv_heads * triton.cdiv(heads // kv_heads, row_heads)
    splits = 1
    if decode:
        most_tiles = triton.cdiv(batch.block_tables.shape[1] * block_size, tile.block_n)
        splits = num_splits(programs, programs_wanted(query.device), batch.counters.numel(), most_tiles)
    constants = _constants(
        heads, kv_heads, dim, value_dim, block_size, tile, _is_latent(key_cache, value_cache), decode, splits > 1,
        limited=limits.window > 0 or limits.chunk > 0, softcap=limits.softcap > 0, sinks=limits.sinks is not None,
        mixed=batch.splits_decodes,
    )  # fmt: skip
    _attention[(programs, splits)](
        Rows(query, *query.stride()[:2]), Cache(key_cache, *key_cache.stride()[:3]),
        Cache(value_cache, *value_cache.stride()[:3]), out,
        Indices(batch.query_starts, batch.kv_lens, batch.block_tables),
        query if limits.sinks is None else limits.sinks,  # an argument that is not read still needs a pointer
        scratch(programs * splits if splits > 1 else 0, row_heads, constants["VALUE"], query.device), batch.counters,
        count, splits, limits.scale, limits.softcap, limits.window or NO_LIMIT, limits.chunk or NO_LIMIT,
        batch.block_tables.stride(0), **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


@_launch.register_fake
def _(query: Tensor, key_cache: Tensor, value_cache: Tensor, *_: object) -> Tensor:
    return query.new_empty(*query.shape[:2], value_cache.shape[-1])


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: DeviceBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """As in reference.py, for a batch on the device. Rows that belong to no sequence are not written.

    Caches may be strided views; their last dimension is contiguous. A launch can be captured: its grid follows from
    shapes and max_query_len alone.
    """
    lengths = batch.max_query_len, batch.splits_decodes
    indices = batch.query_starts, batch.kv_lens, batch.block_tables, batch.counters, *lengths
    return _launch(query, key_cache, value_cache, *indices, scale, window or 0, chunk or 0, softcap or 0.0, sinks)


# (name, Hq, Hkv, D, Dv, queries, options) of what is compiled ahead of time
_SHAPES = (
    ("decode d64 sinks", 64, 8, 64, 64, 1, {"sinks": True, "limited": True}),
    ("decode d128", 32, 8, 128, 128, 1, {}),
    ("decode d80", 32, 32, 80, 80, 1, {}),
    ("decode d256 softcap", 8, 4, 256, 256, 1, {"softcap": True, "limited": True}),
    ("decode d192/128", 16, 16, 192, 128, 1, {}),
    ("decode latent 16 heads", 16, 1, 576, 512, 1, {"latent": True}),
    ("decode latent 128 heads", 128, 1, 576, 512, 1, {"latent": True}),
    ("few d128", 32, 8, 128, 128, 8, {}),
    ("prefill d64 sinks", 64, 8, 64, 64, 2048, {"sinks": True, "limited": True}),
    ("prefill d128", 32, 8, 128, 128, 2048, {}),
    ("prefill d96", 32, 32, 96, 96, 2048, {}),
    ("prefill d256 softcap", 8, 4, 256, 256, 2048, {"softcap": True, "limited": True}),
    ("prefill d192/128", 16, 16, 192, 128, 2048, {}),
    ("prefill latent 16 heads", 16, 1, 576, 512, 2048, {"latent": True}),
)


def configurations() -> Iterator[Configuration]:
    """One a tile shape and kind of head in bfloat16, and Llama's in float32."""
    for element, shapes in (("bf16", _SHAPES), ("fp32", [it for it in _SHAPES if it[0].endswith(" d128")])):
        pointer, cache = f"*{element}:16", Cache(f"*{element}:16", *["i32:16"] * 3)
        types = dict(
            query=Rows(pointer, "i32:16", "i32:16"), keys=cache, values=cache, out=pointer,
            indices=Indices(*["*i32:16"] * 3), sinks=pointer, parts=Parts(*["*fp32:16"] * 3), counters="*i32:16",
            num_sequences="i32", splits="i32", scale="fp32", softcap="fp32", window="i32", chunk="i32",
            table_stride="i32",
        )  # fmt: skip
        for (name, heads, kv_heads, dim, value_dim, queries, options), targets in product(shapes, (NVIDIA, AMD)):
            tile = choose_tile(dim, queries * heads // kv_heads, 2 if element == "bf16" else 4, targets == AMD)
            options = {"latent": False} | options
            decode = queries == 1
            constants = _constants(heads, kv_heads, dim, value_dim, 16, tile, decode=decode, split=decode, **options)
            yield Configuration(
                f"{name} {element}", _attention, types, constants, tile.num_warps, tile.num_stages, targets
            )
