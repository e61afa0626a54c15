"""paged_attention on the GPU: prefill chunks and decodes of a batch in one launch.

A program computes one tile of scores: some queries of one sequence times the query heads that share a key head, folded
into the rows. It finds its sequence by binary search over query_starts, as vLLM's unified attention does. Keys that no
query of the tile sees are not read: neither blocks outside of windows and chunks, nor the rest of a last block, which
may hold anything. Masked loads give zeros there, so no block needs to be cleared before its first use.

Where all are decodes and they are few, the keys of each are split over programs. Partial sums go to scratch, and the
last program of a sequence to arrive adds them up, always in the same order. Long decodes beside prefills are worth a
launch of their own for that.

MLA's absorbed form is Hkv = 1 with values that are the leading part of the keys: those are then read once.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import AMD, NVIDIA, Configuration, dot
from kernels.paged_attention.batch import DeviceBatch

NO_LIMIT = 2**31 - 1
MAX_SPLITS = 32  # one program adds them up
LEAST_TILES = tl.constexpr(4)  # of keys in a split
PROCESSORS = 132  # where there is none to ask: an H100 or H200
_LOG2E = tl.constexpr(1.4426950408889634)


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


@triton.jit(do_not_specialize=["num_sequences", "splits", "window", "chunk", "table_stride"])
def _attention(
    query, key_cache, value_cache, out,  # [T, Hq, DIM]; caches [blocks, BLOCK_SIZE, Hkv, ..]; [T, Hq, VALUE_DIM]
    query_starts, kv_lens, block_tables, sinks,
    partial_sums, partial_maxima, partial_totals, counters,  # f32 [programs, splits, ROW_HEADS(, VALUE)]; i32
    num_sequences, splits, scale, softcap, window, chunk,
    query_stride, query_head_stride, key_block_stride, key_offset_stride, key_head_stride,
    value_block_stride, value_offset_stride, value_head_stride, table_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, ROW_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DECODE: tl.constexpr, SPLIT: tl.constexpr, LIMITED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, LATENT: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Programs: (query tile, head tile), head tiles of a query tile next to each other; splits on axis 1.

    Row r of a tile is query r // ROW_HEADS and head r % ROW_HEADS. Keys have MAIN + TAIL elements, both powers of two,
    padded with zeros from DIM on. LATENT: a key's first MAIN elements are its value.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    HEAD_TILES: tl.constexpr = (GROUP + ROW_HEADS - 1) // ROW_HEADS
    QUERIES: tl.constexpr = BLOCK_M // ROW_HEADS
    program = tl.program_id(0)
    split = tl.program_id(1)
    tile = program // (KV_HEADS * HEAD_TILES)
    column = program % (KV_HEADS * HEAD_TILES)
    kv_head = column // HEAD_TILES

    sequence = tile
    if not DECODE:
        sequence = _find_sequence(query_starts, tile, num_sequences, QUERIES)
    first_row = tl.load(query_starts + sequence)
    query_len = tl.load(query_starts + sequence + 1) - first_row
    kv_len = tl.load(kv_lens + sequence)
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
        # a part of fewer tiles is not worth its share of the merge
        length = tl.maximum(tl.cdiv(tl.cdiv(tl.maximum(end - begin, 1), BLOCK_N), splits), LEAST_TILES) * BLOCK_N
        active = tl.maximum(tl.cdiv(end - begin, length), 1)
        begin += split * length
        end = tl.minimum(begin + length, end)
    if split >= active:
        return

    main = tl.arange(0, MAIN)
    dims = tl.arange(0, VALUE)
    query_rows = query + (first_row + queries).to(tl.int64) * query_stride + heads * query_head_stride
    query_main = _load(query_rows, main, present, DIM if DIM < MAIN else MAIN, MAIN)
    if TAIL:
        tail = MAIN + tl.arange(0, TAIL)
        query_tail = _load(query_rows, tail, present, DIM, MAIN + TAIL)
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    accumulated = tl.zeros((BLOCK_M, VALUE), tl.float32)
    key_head = key_cache + kv_head.to(tl.int64) * key_head_stride
    value_head = value_cache + kv_head.to(tl.int64) * value_head_stride
    table = block_tables + sequence.to(tl.int64) * table_stride
    keys = begin + tl.arange(0, BLOCK_N)
    next_block = tl.load(table + keys // BLOCK_SIZE, mask=keys < end, other=0)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        seen = keys < end
        block = next_block.to(tl.int64)
        next_keys = keys + BLOCK_N  # a tile ahead, so that the addresses of keys wait for no load
        next_block = tl.load(table + next_keys // BLOCK_SIZE, mask=next_keys < end, other=0)
        offset = keys % BLOCK_SIZE
        key_rows = key_head + block * key_block_stride + offset * key_offset_stride
        key_main = _load(key_rows, main, seen, DIM if DIM < MAIN else MAIN, MAIN)
        scores = dot(query_main, tl.trans(key_main), tl.zeros((BLOCK_M, BLOCK_N), tl.float32))
        if TAIL:
            key_tail = _load(key_rows, tail, seen, DIM, MAIN + TAIL)
            scores = dot(query_tail, tl.trans(key_tail), scores)
        if HAS_SOFTCAP:  # tanh(x) = 1 - 2 / (e^2x + 1), for any x without overflow
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (scale / softcap * 2.0 * _LOG2E)) + 1.0)) * _LOG2E
        else:
            scores = scores * (scale * _LOG2E)
        visible = seen[None, :]
        if not DECODE:
            visible = visible & (keys[None, :] <= positions[:, None])
            if LIMITED:
                visible = visible & (keys[None, :] >= first_keys[:, None])
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
            value_rows = value_head + block * value_block_stride + offset * value_offset_stride
            value = _load(value_rows, dims, seen, VALUE_DIM, VALUE)
        accumulated = dot(weights.to(value.dtype), value, accumulated * rescale[:, None])

    out_rows = out + ((first_row + queries).to(tl.int64) * HEADS + heads) * VALUE_DIM
    if SPLIT and active > 1:
        in_part = rows < ROW_HEADS
        part = (program * splits + split) * ROW_HEADS + rows
        sums = partial_sums + part.to(tl.int64)[:, None] * VALUE + dims[None, :]
        tl.store(sums, accumulated, mask=in_part[:, None])
        tl.store(partial_maxima + part, maximum, mask=in_part)
        tl.store(partial_totals + part, total, mask=in_part)
        tl.debug_barrier()  # all threads have stored before one of them says so
        arrived = tl.atomic_add(counters + program, 1, sem="acq_rel")
        if arrived == active - 1:
            tl.store(counters + program, 0)
            maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            accumulated = tl.zeros((BLOCK_M, VALUE), tl.float32)
            for other in tl.range(0, active, num_stages=1 if LATENT else 4):
                part = (program * splits + other) * ROW_HEADS + rows
                sums = partial_sums + part.to(tl.int64)[:, None] * VALUE + dims[None, :]
                part_maximum = tl.load(partial_maxima + part, mask=in_part, other=0.0, cache_modifier=".cg")
                part_total = tl.load(partial_totals + part, mask=in_part, other=0.0, cache_modifier=".cg")
                part_sums = tl.load(sums, mask=in_part[:, None], other=0.0, cache_modifier=".cg")
                highest = tl.maximum(maximum, part_maximum)
                rescale = tl.exp2(maximum - highest)
                part_rescale = tl.exp2(part_maximum - highest)
                maximum = highest
                total = total * rescale + part_total * part_rescale
                accumulated = accumulated * rescale[:, None] + part_sums * part_rescale[:, None]
            _write(out_rows, dims, present, accumulated, maximum, total, sinks, heads, VALUE_DIM, HAS_SINKS)
    else:
        _write(out_rows, dims, present, accumulated, maximum, total, sinks, heads, VALUE_DIM, HAS_SINKS)


class Tile(NamedTuple):
    """Rows and keys of a tile of scores, and how it is computed."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_tile(dim: int, rows: int, element_size: int, is_amd: bool = bool(torch.version.hip)) -> Tile:
    """By the size of a key and the rows that a sequence has at most (its queries times heads of a group)."""
    if element_size > 2:  # float32 is multiplied without tensor cores, from registers
        return Tile(16, 16, 4, 2)
    if dim > 256:  # absorbed MLA: accumulators of 512 columns. Two tiles of keys pass a CDNA3's 64 KiB of shared memory
        if is_amd:
            return Tile(16, 32, 8, 2) if rows <= 16 else Tile(32, 16, 8, 2)
        return Tile(16 if rows <= 16 else 32, 32, 8, 3)
    if rows <= 16:
        return Tile(16, 64, 4, 3) if dim <= 128 else Tile(16, 32, 4, 3)
    if dim > 128:
        return Tile(64, 64 if dim <= 192 else 32, 8, 2)
    return Tile(64, 32, 4, 3) if rows <= 64 else Tile(128, 64, 8, 2)


def split_dim(dim: int) -> tuple[int, int]:
    """A head size as a power of two and a smaller one, or 0; a product takes 16 at least. 576 = 512 + 64."""
    padded = max(16, triton.next_power_of_2(dim))
    main = padded // 2
    tail = max(16, triton.next_power_of_2(dim - main))
    return (main, tail) if padded > 16 and tail < main else (padded, 0)


@lru_cache
def _programs_wanted(device: torch.device) -> int:
    """Two a processor."""
    cuda = device.type == "cuda"
    return 2 * (torch.cuda.get_device_properties(device).multi_processor_count if cuda else PROCESSORS)


def _num_splits(programs: int, wanted: int, counters: int, most_tiles: int) -> int:
    """From shapes alone, so that a captured launch holds for any lengths."""
    return max(1, min(wanted // programs, MAX_SPLITS, most_tiles)) if programs <= counters else 1


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


@torch.library.custom_op("heddle::paged_attention", mutates_args=("counters",))
def _launch(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_starts: Tensor,
    kv_lens: Tensor,
    block_tables: Tensor,
    counters: Tensor,
    max_query_len: int,
    splits_decodes: bool,
    scale: float,
    window: int,
    chunk: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """window, chunk, softcap: 0 for none."""
    tokens, heads, dim = query.shape
    block_size, kv_heads = key_cache.shape[1:3]
    value_dim, count = value_cache.shape[-1], len(kv_lens)
    out = query.new_empty(tokens, heads, value_dim)
    if tokens == 0 or count == 0:
        return out
    assert key_cache.stride(-1) == 1 and value_cache.stride(-1) == 1 and block_tables.stride(-1) == 1
    if query.stride(-1) != 1:
        query = query.contiguous()
    limits = (window, chunk, softcap, sinks)
    for most in (1, max_query_len) if splits_decodes else (max_query_len,):
        _attend(query, key_cache, value_cache, out, query_starts, kv_lens, block_tables, counters, most, scale, *limits,
                splits_decodes)  # fmt: skip
    return out


def _attend(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, out: Tensor, query_starts: Tensor, kv_lens: Tensor,
    block_tables: Tensor, counters: Tensor, max_query_len: int, scale: float, window: int, chunk: int, softcap: float,
    sinks: Tensor | None, is_mixed: bool,
) -> None:  # fmt: skip
    """One launch. is_mixed: of the decodes only, or of the others only.

    A decode's keys are split over programs. In the tiles of a prefill one program would walk all of them.
    """
    tokens, heads, dim = query.shape
    block_size, kv_heads = key_cache.shape[1:3]
    value_dim, count = value_cache.shape[-1], len(kv_lens)
    decode = max_query_len == 1
    tile = choose_tile(dim, max_query_len * (heads // kv_heads), query.element_size())
    row_heads = min(heads // kv_heads, tile.block_m)
    query_tiles = count if decode else tokens // (tile.block_m // row_heads) + count
    programs = query_tiles * kv_heads * triton.cdiv(heads // kv_heads, row_heads)
    splits = 1
    if decode:
        most_tiles = triton.cdiv(block_tables.shape[1] * block_size, tile.block_n)
        splits = _num_splits(programs, _programs_wanted(query.device), counters.numel(), most_tiles)
    latent = _is_latent(key_cache, value_cache)
    constants = _constants(heads, kv_heads, dim, value_dim, block_size, tile, latent, decode, splits > 1,
                           window > 0 or chunk > 0, softcap > 0, sinks is not None, is_mixed)  # fmt: skip
    parts = programs * splits * row_heads if splits > 1 else 0
    partial_sums = torch.empty(parts, constants["VALUE"], dtype=torch.float32, device=query.device)
    partial_maxima = torch.empty(parts, dtype=torch.float32, device=query.device)
    partial_totals = torch.empty(parts, dtype=torch.float32, device=query.device)
    _attention[(programs, splits)](
        query, key_cache, value_cache, out, query_starts, kv_lens, block_tables, query if sinks is None else sinks,
        partial_sums, partial_maxima, partial_totals, counters, count, splits, scale, softcap,
        window or NO_LIMIT, chunk or NO_LIMIT, *query.stride()[:2], *key_cache.stride()[:3],
        *value_cache.stride()[:3], block_tables.stride(0), **constants, num_warps=tile.num_warps,
        num_stages=tile.num_stages,
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
    """As the reference, for a batch on the device. Rows of no sequence are not written.

    Caches may be strided views; the last dimension is contiguous. Can be captured: the grid follows from shapes and
    max_query_len alone.
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
        for (name, heads, kv_heads, dim, value_dim, queries, options), targets in product(shapes, (NVIDIA, AMD)):
            tile = choose_tile(dim, queries * heads // kv_heads, 2 if element == "bf16" else 4, targets == AMD)
            options = {"latent": False} | options
            decode = queries == 1
            constants = _constants(heads, kv_heads, dim, value_dim, 16, tile, decode=decode, split=decode, **options)
            types = {name: "i32" for name in _attention.arg_names if name not in constants}
            types |= {name: f"*{element}" for name in ("query", "key_cache", "value_cache", "out", "sinks")}
            types |= {name: "*i32" for name in ("query_starts", "kv_lens", "block_tables", "counters")}
            types |= {name: "*fp32" for name in ("partial_sums", "partial_maxima", "partial_totals")}
            types |= {"scale": "fp32", "softcap": "fp32"}
            unaligned = ("num_sequences", "splits", "scale", "softcap", "window", "chunk", "table_stride")
            aligned = tuple(name for name in types if name not in unaligned)
            yield Configuration(
                f"{name} {element}", _attention, types, constants, aligned, tile.num_warps, tile.num_stages, targets
            )
