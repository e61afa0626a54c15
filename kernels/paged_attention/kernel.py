"""Triton form of paged_attention: prefill chunks and decodes of a batch in one launch.

A program computes tiles of scores, one after another. Their rows are some queries of one sequence times the query heads
that share a key head, so that a key is read once for all of them. The grid is made for the most tiles that the shapes
allow and for a number of chunks beside; a program finds the queries and the chunk of keys that are its own from the
lengths (work/), and ends if there are none.

Keys that no query of the tile sees are not read: neither blocks outside of windows and chunks, nor the rest of a last
block, which may hold anything. Masked loads give zeros there, so no block needs to be cleared before its first use.

Where a tile's keys are several chunks, their programs' results are added up by whoever arrives last (splits/).

Absorbed attention (MLA) has one key head, and its values are the leading columns of the keys: those are read once.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import AMD, NVIDIA, Configuration, dot
from kernels.compiled.launch import launch
from kernels.paged_attention.batch import DeviceBatch
from kernels.paged_attention.splits.kernel import (
    FAN,
    Parts,
    add_sums,
    add_totals,
    arrives_last,
    processors,
    scratch,
    slice_of,
    store_part,
    store_sums,
    store_totals,
)
from kernels.paged_attention.tiles import Tile, choose_tile, least_keys, split_dim
from kernels.paged_attention.work.kernel import chunk_tiles, find_sequence, key_tiles, query_tiles

NO_LIMIT = 1 << 30  # beyond any position, and still so where it is taken from a negative one, which padding has
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
def _load(rows, dims, present, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """[len(rows), PADDED] from pointers to rows of SIZE elements; zeros where not present."""
    if SIZE == PADDED:
        return tl.load(rows[:, None] + dims[None, :], mask=present[:, None], other=0.0)
    else:
        return tl.load(rows[:, None] + dims[None, :], mask=present[:, None] & (dims < SIZE)[None, :], other=0.0)


@triton.jit
def _whose(rows, first_query, query_len, column, QUERIES: tl.constexpr, ROW_HEADS: tl.constexpr, GROUP: tl.constexpr,
           HEAD_TILES: tl.constexpr):  # fmt: skip
    """(query, head, whether there is one) of rows of a tile."""
    queries = first_query + rows // ROW_HEADS
    head_in_group = (column % HEAD_TILES) * ROW_HEADS + rows % ROW_HEADS
    present = (rows < QUERIES * ROW_HEADS) & (queries < query_len) & (head_in_group < GROUP)
    return queries, column // HEAD_TILES * GROUP + head_in_group, present


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


@triton.jit(do_not_specialize=["num_sequences", "spare", "least", "window", "chunk", "table_stride"])
def _attention(
    query, keys, values, out, indices, sinks, parts,  # Rows, Cache, Cache, [T, Hq, VALUE_DIM], Indices, [Hq], Parts
    num_sequences, spare, least, scale, softcap, window, chunk, table_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, ROW_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DECODE: tl.constexpr, SPLIT: tl.constexpr, LIMITED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, LATENT: tl.constexpr, PART_ROWS: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """Programs: (chunk of keys, query tile, head tile), head tiles of a query tile next to each other.

    Row r of a tile is query r // ROW_HEADS and head r % ROW_HEADS; a part is its first PART_ROWS rows. Keys have
    MAIN + TAIL elements, both powers of two, padded with zeros from DIM on. LATENT: a key's first MAIN elements are its
    value. spare, least: see work/, in tiles of keys.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HEAD_TILES: tl.constexpr = (GROUP + ROW_HEADS - 1) // ROW_HEADS
    COLUMNS: tl.constexpr = KV_HEADS * HEAD_TILES
    QUERIES: tl.constexpr = BLOCK_M // ROW_HEADS
    program = tl.program_id(0)
    column = program % COLUMNS
    kv_head = column // HEAD_TILES

    # which queries of which sequence
    length = 1
    if SPLIT:
        length = chunk_tiles(indices, num_sequences, spare, least, window, chunk, QUERIES, BLOCK_N, LIMITED, DECODE)
    number = program // COLUMNS
    sequence, first_number, first_part = find_sequence(
        indices, number, length, num_sequences, window, chunk, QUERIES, BLOCK_N, LIMITED, DECODE, SPLIT
    )
    if sequence >= num_sequences:
        return
    first_row = tl.load(indices.query_starts + sequence)
    query_len = tl.load(indices.query_starts + sequence + 1) - first_row
    kv_len = tl.load(indices.kv_lens + sequence)
    tiles = query_tiles(query_len, QUERIES, DECODE)
    first_query = (number - first_number) % tiles * QUERIES
    rows = tl.arange(0, BLOCK_M)
    queries, heads, present = _whose(rows, first_query, query_len, column, QUERIES, ROW_HEADS, GROUP, HEAD_TILES)

    # which keys: [begin, end), of which this program takes a chunk
    context = kv_len - query_len
    positions = context + queries
    first_position = context + first_query
    end = tl.minimum(first_position + QUERIES, kv_len)
    begin = 0
    first_keys = tl.zeros((BLOCK_M,), tl.int32)
    if LIMITED:
        begin = tl.maximum(tl.maximum(first_position - window + 1, first_position // chunk * chunk), 0)
        first_keys = tl.maximum(positions - window + 1, positions // chunk * chunk)
    split = 0
    active = 1
    if SPLIT:
        split = (number - first_number) // tiles
        active = tl.maximum(tl.cdiv(end - begin, length * BLOCK_N), 1)  # a tile may see less than its sequence's last
        begin += split * length * BLOCK_N
        end = tl.minimum(begin + length * BLOCK_N, end)
        if split >= active:
            return
        most = tl.maximum(tl.cdiv(key_tiles(kv_len, window, chunk, QUERIES, BLOCK_N, LIMITED), length), 1)
        first_part = (first_part + (number - first_number) % tiles * most) * COLUMNS + column

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

    if SPLIT and active > 1:
        part = first_part + split * COLUMNS
        store_part(parts, part, rows, dims, accumulated, maximum, total, PART_ROWS, VALUE)
        kept = tl.arange(0, PART_ROWS)
        queries_kept, heads_kept, present_kept = _whose(
            kept, first_query, query_len, column, QUERIES, ROW_HEADS, GROUP, HEAD_TILES
        )
        target = out + ((first_row + queries_kept).to(tl.int64) * HEADS + heads_kept) * VALUE_DIM
        step = COLUMNS  # between the parts of a level
        above = 0  # levels are counted in different counters
        while active > 1:
            group = first_part + split // FAN * FAN * step
            members = tl.minimum(active - split // FAN * FAN, FAN)
            if arrives_last(parts, group + above, members):
                highest, whole = add_totals(parts, group, step, members, kept, PART_ROWS)
                for first_dim in range(0, VALUE, SLICE):
                    some = first_dim + tl.arange(0, SLICE)
                    added = add_sums(parts, group, step, members, highest, kept, some, PART_ROWS, VALUE, SLICE)
                    if active > FAN:
                        store_sums(parts, group, added, kept, some, PART_ROWS, VALUE)
                    else:
                        _write(target, some, present_kept, added, highest, whole, sinks, heads_kept, VALUE_DIM,
                               HAS_SINKS)  # fmt: skip
                if active > FAN:
                    store_totals(parts, group, highest, whole, kept, PART_ROWS)
                split = split // FAN
                active = tl.cdiv(active, FAN)
                step = step * FAN
                above += COLUMNS
            else:
                active = 0
    else:
        out_rows = out + ((first_row + queries).to(tl.int64) * HEADS + heads) * VALUE_DIM
        _write(out_rows, dims, present, accumulated, maximum, total, sinks, heads, VALUE_DIM, HAS_SINKS)


def _constants(
    heads: int, kv_heads: int, dim: int, value_dim: int, block_size: int, tile: Tile, latent: bool, decode: bool,
    split: bool, limited: bool = False, softcap: bool = False, sinks: bool = False,
) -> dict[str, int | bool]:  # fmt: skip
    main, tail = split_dim(dim)
    value = max(16, triton.next_power_of_2(value_dim))
    row_heads = min(heads // kv_heads, tile.block_m)
    part_rows = triton.next_power_of_2(row_heads) if decode else tile.block_m
    return {
        "HEADS": heads, "KV_HEADS": kv_heads, "ROW_HEADS": row_heads,
        "BLOCK_SIZE": block_size, "DIM": dim, "VALUE_DIM": value_dim, "MAIN": main, "TAIL": tail,
        "VALUE": value, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "DECODE": decode, "SPLIT": split, "LIMITED": limited, "HAS_SOFTCAP": softcap, "HAS_SINKS": sinks,
        "LATENT": latent, "PART_ROWS": part_rows, "SLICE": slice_of(value, part_rows, tile.num_warps),
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


@launch("paged_attention", mutates_args=("counters",))
def _launch(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, query_starts: Tensor, kv_lens: Tensor, block_tables: Tensor,
    counters: Tensor, max_query_len: int, scale: float, window: int, chunk: int, softcap: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """window, chunk, softcap: 0 for none."""
    out = query.new_empty(*query.shape[:2], value_cache.shape[-1])
    if not len(query) or not len(kv_lens):
        return out
    assert key_cache.stride(-1) == 1 and value_cache.stride(-1) == 1 and block_tables.stride(-1) == 1
    if query.stride(-1) != 1:
        query = query.contiguous()
    limits = Limits(scale, window, chunk, softcap, sinks)
    _attend(query, key_cache, value_cache, out, DeviceBatch(query_starts, kv_lens, block_tables, counters,
                                                            max_query_len), limits)  # fmt: skip
    return out


def _attend(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, out: Tensor, batch: DeviceBatch, limits: Limits
) -> None:
    tokens, heads, dim = query.shape
    block_size, kv_heads = key_cache.shape[1:3]
    value_dim, count = value_cache.shape[-1], len(batch.kv_lens)
    decode = batch.max_query_len == 1
    tile = choose_tile(dim, batch.max_query_len * (heads // kv_heads), query.element_size())
    row_heads = min(heads // kv_heads, tile.block_m)
    columns = kv_heads * triton.cdiv(heads // kv_heads, row_heads)
    query_tiles = min(count, tokens) if decode else tokens // (tile.block_m // row_heads) + min(count, tokens)
    spare, least = _spare(tile, query_tiles, columns, batch.block_tables.shape[1] * block_size, batch.counters)
    constants = _constants(
        heads, kv_heads, dim, value_dim, block_size, tile, _is_latent(key_cache, value_cache), decode, spare > 0,
        limited=limits.window > 0 or limits.chunk > 0, softcap=limits.softcap > 0, sinks=limits.sinks is not None,
    )  # fmt: skip
    _attention[((query_tiles + spare) * columns,)](
        Rows(query, *query.stride()[:2]), Cache(key_cache, *key_cache.stride()[:3]),
        Cache(value_cache, *value_cache.stride()[:3]), out,
        Indices(batch.query_starts, batch.kv_lens, batch.block_tables),
        query if limits.sinks is None else limits.sinks,  # an argument that is not read still needs a pointer
        scratch(2 * spare * columns, constants["PART_ROWS"], constants["VALUE"], batch.counters),
        count, spare, least, limits.scale, limits.softcap, limits.window or NO_LIMIT, limits.chunk or NO_LIMIT,
        batch.block_tables.stride(0), **constants, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _spare(tile: Tile, query_tiles: int, columns: int, most_keys: int, counters: Tensor) -> tuple[int, int]:
    """(chunks beside one for each query tile, tiles of keys in the shortest chunk), as work/ has them.

    Both follow from shapes alone. 0: no sequence can have more keys than the shortest chunk. Scratch memory is for
    2 * spare parts of each column: on an H100 4 MiB for Llama's decodes, 34 MiB at most for latents and for prefills.
    """
    least = triton.cdiv(least_keys(tile), tile.block_n)
    longer = triton.cdiv(most_keys, tile.block_n) - least
    if longer <= 0:
        return 0, least
    wanted = tile.programs * processors(counters.device) // columns
    return min(max(wanted, 1), query_tiles * triton.cdiv(longer, least), counters.numel() // (2 * columns)), least


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
    indices = batch.query_starts, batch.kv_lens, batch.block_tables, batch.counters, batch.max_query_len
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
            indices=Indices(*["*i32:16"] * 3), sinks=pointer, parts=Parts(*["*fp32:16"] * 3, "*i32:16"),
            num_sequences="i32", spare="i32", least="i32", scale="fp32", softcap="fp32", window="i32", chunk="i32",
            table_stride="i32",
        )  # fmt: skip
        for (name, heads, kv_heads, dim, value_dim, queries, options), targets in product(shapes, (NVIDIA, AMD)):
            tile = choose_tile(dim, queries * heads // kv_heads, 2 if element == "bf16" else 4, targets == AMD)
            options = {"latent": False} | options
            decode = queries == 1
            constants = _constants(heads, kv_heads, dim, value_dim, 16, tile, decode=decode, split=True, **options)
            yield Configuration(
                f"{name} {element}", _attention, types, constants, tile.num_warps, tile.num_stages, targets
            )
