"""Triton form of lora: one launch for all slices of a site, all adapters and all ranks of the batch.

Decode is a matter of launches, not of bytes: an adapter of rank 16 adds half a percent to the weights that a step
streams. Programs take work by ticket: all shrinks (tile, slice, part of the depth) come before all expands (tile,
slice, columns). An expand loads what it can, then waits for the shrinks of its tile and slice. Those were taken by
programs that run and never wait, so there is no deadlock however few programs are resident, and no cooperative launch.
Parts of the depth are kept apart and summed in fixed order, so the result does not depend on timing. Whoever takes the
last ticket sets the counters back to zero: the launch can be replayed from a graph.

Ranks are true in memory and walked in steps of 16, so nothing is padded to the largest. For prefill the same work is
done by two plain launches; they are the cross-check as well.

Inside routed experts the tiles are those that expert_route made: what they call a slot is an expert place, and so are
the table's rows. Their rows are positions; where x or y is in another order, it is found through the pairs (CHOICES,
SCATTERS).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.adapter_rows import FEW_TILE_ROWS, AdapterTiles
from kernels.compiled.kernel import Configuration, dot, stages
from kernels.expert_route import Routed
from kernels.lora.site import TABLE_FIELDS, Field, LoraSite, SiteAdapters

DECODE_COLUMNS = 64  # of an expand: one item of work
_RANKS = 16  # ranks at a time: a matrix instruction's
_FIELDS = tl.constexpr(TABLE_FIELDS)
_A, _B, _GAIN = tl.constexpr(int(Field.A)), tl.constexpr(int(Field.B)), tl.constexpr(int(Field.GAIN))
_RANK, _SCALE = tl.constexpr(int(Field.RANK)), tl.constexpr(int(Field.SCALE))
_TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def _entry(table, table_stride, slot, part):
    """a, b, gain (addresses), rank and scale of an adapter's slice."""
    row = table + slot.to(tl.int64) * table_stride + part * _FIELDS
    rank = tl.load(row + _RANK).to(tl.int32)
    scale = tl.load(row + _SCALE).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.load(row + _A), tl.load(row + _B), tl.load(row + _GAIN), rank, scale


@triton.jit
def _shrink(
    x, z, table, table_stride, pairs, tiles, tile, part, split, T, max_rank, stride_x,
    K: tl.constexpr, CHOICES: tl.constexpr, OWN: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr,
    SL: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, RB: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """z[split, part, rows, :rank] = x[rows] @ a^T over this split of the depth; z [SPLITS, SL, T, max_rank] float32.

    CHOICES above 0: x is read at pairs[rows] // CHOICES.
    """
    if OWN:
        x += part * K
    slot = tl.load(tiles + tile * 3)
    start = tl.load(tiles + tile * 3 + 1)
    m = tl.arange(0, TILE)
    row_mask = m < tl.load(tiles + tile * 3 + 2)
    a_address, _, _, rank, _ = _entry(table, table_stride, slot, part)
    a = a_address.to(tl.pointer_type(DT))
    if ALIGNED:  # an address out of a table says nothing of itself, and would be read an element at a time
        a = tl.multiple_of(a, 16)
    depth: tl.constexpr = ((K + SPLITS - 1) // SPLITS + BK - 1) // BK * BK  # of one split, whole blocks
    rows = (start + m).to(tl.int64)
    if CHOICES > 0:
        read = (tl.load(pairs + rows, mask=row_mask, other=0) // CHOICES).to(tl.int64)
    else:
        read = rows
    k = tl.arange(0, BK)
    r = tl.arange(0, RB)
    for first_rank in range(0, rank, RB):
        ranks = first_rank + r
        total = tl.zeros((TILE, RB), tl.float32)
        for first in range(split * depth, tl.minimum(split * depth + depth, K), BK):
            deep = first + k
            seen = tl.load(x + read[:, None] * stride_x + deep[None, :],
                           mask=row_mask[:, None] & (deep < K)[None, :], other=0.0)  # fmt: skip
            weight_at = deep[:, None] * rank + ranks[None, :] if TRANSPOSED else ranks[None, :] * K + deep[:, None]
            weight = tl.load(a + weight_at, mask=(ranks < rank)[None, :] & (deep < K)[:, None], other=0.0)  # fmt: skip
            total = dot(seen, weight, total)
        z_at = z + ((split * SL + part) * T + rows)[:, None] * max_rank + ranks[None, :]
        tl.store(z_at, total, mask=row_mask[:, None] & (ranks < rank)[None, :])
    return rank


@triton.jit
def _expand(
    y, z, bias, table, table_stride, offsets, pairs, tiles, counters, tile, part, column_block, T, max_rank,
    stride_y,
    SCATTERS: tl.constexpr, TRANSPOSED: tl.constexpr, SL: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
    RB: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr, DT: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """y[rows, columns] += scale * z @ b^T, with z summed over the splits; then the gain, if there is one.

    SCATTERS: y is written at pairs[rows].
    """
    begin = tl.load(offsets + part)
    width = tl.load(offsets + part + 1) - begin
    if column_block * BN < width:
        slot = tl.load(tiles + tile * 3)
        start = tl.load(tiles + tile * 3 + 1)
        m = tl.arange(0, TILE)
        row_mask = m < tl.load(tiles + tile * 3 + 2)
        _, b_address, gain_address, rank, scale = _entry(table, table_stride, slot, part)
        if (rank > 0) | (gain_address != 0):
            b = b_address.to(tl.pointer_type(DT))
            rows = (start + m).to(tl.int64)
            n = column_block * BN + tl.arange(0, BN)
            column_mask = n < width
            mask = row_mask[:, None] & column_mask[None, :]
            if SCATTERS:
                written = tl.load(pairs + rows, mask=row_mask, other=0).to(tl.int64)
            else:
                written = rows
            y_at = y + written[:, None] * stride_y + (begin + n)[None, :]
            prior = tl.load(y_at, mask=mask, other=0.0).to(tl.float32)  # under way before the wait
            if WAITS:
                if rank > 0:
                    while tl.atomic_add(counters + 1 + tile * SL + part, 0, sem="acquire", scope="gpu") < SPLITS:
                        pass
                    tl.debug_barrier()
            r = tl.arange(0, RB)
            total = tl.zeros((TILE, BN), tl.float32)
            for first_rank in range(0, rank, RB):
                ranks = first_rank + r
                z_mask = row_mask[:, None] & (ranks < rank)[None, :]
                shrunk = tl.zeros((TILE, RB), tl.float32)
                for split in tl.static_range(SPLITS):  # always in this order
                    z_at = z + ((split * SL + part) * T + rows)[:, None] * max_rank + ranks[None, :]
                    shrunk += tl.load(z_at, mask=z_mask, other=0.0, cache_modifier=".cg")
                wide = n[None, :].to(tl.int64)
                weight_at = ranks[:, None] * width + wide if TRANSPOSED else wide * rank + ranks[:, None]
                weight_mask = column_mask[None, :] & (ranks < rank)[:, None]
                weight = tl.load(b + weight_at, mask=weight_mask, other=0.0)
                total = dot(shrunk.to(DT), weight, total)
            out = prior + total * scale
            if gain_address != 0:
                gain = tl.load(gain_address.to(tl.pointer_type(tl.float32)) + n, mask=column_mask, other=0.0)[None, :]
                if HAS_BIAS:
                    held = tl.load(bias + begin + n, mask=column_mask, other=0.0).to(tl.float32)[None, :]
                    out = (out - held) * gain + held
                else:
                    out = out * gain
            tl.store(y_at, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "max_rank", "column_blocks"])
def lora_kernel(
    x, y, z, bias, table, table_stride, offsets, pairs, tiles, num_tiles, counters, T, max_rank, stride_x, stride_y,
    column_blocks,
    K: tl.constexpr, CHOICES: tl.constexpr, SCATTERS: tl.constexpr, OWN: tl.constexpr, TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr, SL: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, RB: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, HAS_BIAS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """The single launch. counters: ticket, then arrivals of each (tile, slice)."""
    if tl.load(table) == 0:  # no adapter acts at this site
        return
    count = tl.load(num_tiles)
    shrinks = count * SL * SPLITS
    total = shrinks + count * SL * column_blocks
    work = tl.atomic_add(counters, 1, sem="relaxed")
    while work < total:
        if work < shrinks:
            part = work // SPLITS % SL
            tile = work // (SPLITS * SL)
            rank = _shrink(x, z, table, table_stride, pairs, tiles, tile, part, work % SPLITS, T, max_rank, stride_x,
                           K, CHOICES, OWN, TRANSPOSED, ALIGNED, SL, SPLITS, TILE, RB, BK, DT)  # fmt: skip
            if rank > 0:  # else nobody waits, and the arrival could land after the reset
                tl.debug_barrier()  # all threads' stores before the one thread's release
                tl.atomic_add(counters + 1 + tile * SL + part, 1, sem="release", scope="gpu")
        else:
            left = work - shrinks
            _expand(y, z, bias, table, table_stride, offsets, pairs, tiles, counters, left // (column_blocks * SL),
                    left // column_blocks % SL, left % column_blocks, T, max_rank, stride_y, SCATTERS, TRANSPOSED, SL,
                    SPLITS, TILE, RB, BN, HAS_BIAS, DT, True)  # fmt: skip
        work = tl.atomic_add(counters, 1, sem="relaxed")
    # every program takes exactly one ticket beyond the work, after all its waits: the last of them resets
    if work == total + tl.num_programs(0) - 1:
        i = tl.arange(0, 128)
        for first in range(0, 1 + count * SL, 128):
            tl.store(counters + first + i, 0, mask=first + i < 1 + count * SL)


@triton.jit(do_not_specialize=["T", "max_rank"])
def shrink_kernel(
    x, z, table, table_stride, pairs, tiles, num_tiles, T, max_rank, stride_x,
    K: tl.constexpr, CHOICES: tl.constexpr, OWN: tl.constexpr, TRANSPOSED: tl.constexpr, ALIGNED: tl.constexpr,
    SL: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, RB: tl.constexpr, BK: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    if tl.load(table) == 0:
        return
    for work in range(tl.program_id(0), tl.load(num_tiles) * SL * SPLITS, tl.num_programs(0)):
        _shrink(x, z, table, table_stride, pairs, tiles, work // (SPLITS * SL), work // SPLITS % SL, work % SPLITS, T,
                max_rank, stride_x, K, CHOICES, OWN, TRANSPOSED, ALIGNED, SL, SPLITS, TILE, RB, BK, DT)  # fmt: skip


@triton.jit(do_not_specialize=["T", "max_rank", "column_blocks"])
def expand_kernel(
    y, z, bias, table, table_stride, offsets, pairs, tiles, num_tiles, T, max_rank, stride_y, column_blocks,
    SCATTERS: tl.constexpr, TRANSPOSED: tl.constexpr, SL: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
    RB: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    if tl.load(table) == 0:
        return
    for work in range(tl.program_id(0), tl.load(num_tiles) * SL * column_blocks, tl.num_programs(0)):
        _expand(y, z, bias, table, table_stride, offsets, pairs, tiles, num_tiles, work // (column_blocks * SL),
                work // column_blocks % SL, work % column_blocks, T, max_rank, stride_y, SCATTERS, TRANSPOSED, SL,
                SPLITS, TILE, RB, BN, HAS_BIAS, DT, False)  # fmt: skip


@torch.library.custom_op("heddle::lora", mutates_args=("y", "counters"))
def _lora(
    y: Tensor, x: Tensor, table: Tensor, offsets: Tensor, bias: Tensor | None, tiles: Tensor, num_tiles: Tensor,
    counters: Tensor, widest: int, tile_rows: int, max_rank: int, own_inputs: bool, transposed: bool,
    single_launch: bool,
) -> None:  # fmt: skip
    _launch(y, x, table, offsets, bias, None, tiles, num_tiles, counters, widest, tile_rows, max_rank, 0, own_inputs,
            transposed, single_launch)  # fmt: skip


@_lora.register_fake
def _(*_: object) -> None:
    return None


@torch.library.custom_op("heddle::expert_lora", mutates_args=("y", "counters"))
def _expert_lora(
    y: Tensor, x: Tensor, table: Tensor, offsets: Tensor, pairs: Tensor, tiles: Tensor, num_tiles: Tensor,
    counters: Tensor, widest: int, tile_rows: int, max_rank: int, choices: int, transposed: bool, single_launch: bool,
) -> None:  # fmt: skip
    """choices: how many pairs a token has, if x is by token; 0 if x is by position, and y by pair number."""
    _launch(y, x, table, offsets, None, pairs, tiles, num_tiles, counters, widest, tile_rows, max_rank, choices, False,
            transposed, single_launch)  # fmt: skip


@_expert_lora.register_fake
def _(*_: object) -> None:
    return None


def _launch(
    y: Tensor, x: Tensor, table: Tensor, offsets: Tensor, bias: Tensor | None, pairs: Tensor | None, tiles: Tensor,
    num_tiles: Tensor, counters: Tensor, widest: int, tile_rows: int, max_rank: int, choices: int, own_inputs: bool,
    transposed: bool, single_launch: bool,
) -> None:  # fmt: skip
    slices = table.shape[1]
    rows, depth = y.shape[0], x.shape[1] // (slices if own_inputs else 1)
    column_width, block_depth, expand_warps = _blocks(tile_rows, x.itemsize)
    splits = _splits(depth, tile_rows, in_experts=pairs is not None)
    z = torch.empty(splits, slices, rows, max_rank, dtype=torch.float32, device=x.device)
    column_blocks = triton.cdiv(widest, column_width)
    held = y if bias is None else bias  # an argument that is not read still needs a pointer
    order = tiles if pairs is None else pairs
    work = dict(TRANSPOSED=transposed, SL=slices, SPLITS=splits, TILE=tile_rows, RB=_RANKS,
                DT=_TRITON_TYPES[x.dtype], num_stages=stages(3))  # fmt: skip
    shrinking = dict(K=depth, CHOICES=choices, OWN=own_inputs, ALIGNED=not own_inputs, BK=block_depth)
    expanding = dict(SCATTERS=pairs is not None and choices == 0, BN=column_width, HAS_BIAS=bias is not None)
    shrinks, expands = tiles.shape[0] * slices * splits, tiles.shape[0] * slices * column_blocks
    programs = 2 * _multiprocessors(x)
    if single_launch:
        lora_kernel[(min(shrinks + expands, programs),)](
            x, y, z, held, table, table.stride(0), offsets, order, tiles, num_tiles, counters, rows, max_rank,
            x.stride(0), y.stride(0), column_blocks, **shrinking, **expanding, **work, num_warps=4,
        )  # fmt: skip
        return
    shrink_kernel[(min(shrinks, 4 * programs),)](
        x, z, table, table.stride(0), order, tiles, num_tiles, rows, max_rank, x.stride(0), **shrinking, **work,
        num_warps=4,
    )  # fmt: skip
    expand_kernel[(min(expands, 4 * programs),)](
        y, z, held, table, table.stride(0), offsets, order, tiles, num_tiles, rows, max_rank, y.stride(0),
        column_blocks, **expanding, **work, num_warps=expand_warps,
    )  # fmt: skip


def lora(
    y: Tensor,
    x: Tensor,
    site: LoraSite,
    adapters: SiteAdapters,
    tiles: AdapterTiles,
    max_rank: int,
    bias: Tensor | None = None,
    single_launch: bool | None = None,
) -> None:
    """As in reference.py. single_launch: None chooses by the rows of a tile."""
    assert adapters.table is not None and adapters.offsets is not None
    assert tiles.tiles is not None and tiles.num_tiles is not None and tiles.counters is not None
    if single_launch is None:
        single_launch = tiles.tile_rows <= FEW_TILE_ROWS
    _lora(y, x, adapters.table, adapters.offsets, bias, tiles.tiles, tiles.num_tiles, tiles.counters, max(site.widths),
          tiles.tile_rows, max_rank, site.own_inputs, site.transposed, single_launch)  # fmt: skip


def expert_lora(
    y: Tensor,
    x: Tensor,
    site: LoraSite,
    adapters: SiteAdapters,
    routed: Routed,
    gathers: bool,
    max_rank: int,
    counters: Tensor,
    single_launch: bool | None = None,
) -> None:
    """As in reference.py. counters: [1 + most tiles * slices] int32, zero; left zero. single_launch as in lora."""
    assert adapters.table is not None and adapters.offsets is not None and not site.own_inputs
    assert counters.numel() > routed.tiles.shape[0] * len(site.widths)
    if single_launch is None:
        single_launch = routed.tile_rows <= FEW_TILE_ROWS
    _expert_lora(y, x, adapters.table, adapters.offsets, routed.pairs, routed.tiles, routed.num_tiles, counters,
                 max(site.widths), routed.tile_rows, max_rank, routed.places.shape[1] if gathers else 0,
                 site.transposed, single_launch)  # fmt: skip


def _blocks(tile: int, itemsize: int) -> tuple[int, int, int]:
    """Columns of an expand, depth of a shrink's step, warps of an expand."""
    return (DECODE_COLUMNS, 256 // itemsize, 4) if tile <= 16 else (64, 128 // itemsize, 8)


def _splits(depth: int, tile: int, in_experts: bool = False) -> int:
    """Parts of the depth: so many that one adapter's shrinks fill a quarter of the machine; one at prefill.

    Two inside experts, of which even a single token has several; four would spill on sm_80.
    """
    return min(2 if in_experts else 8, max(1, depth // 512)) if tile <= 16 else 1


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


def configurations() -> Iterator[Configuration]:
    """Sites of Llama-3.1-8B, of DeepSeek-V2-Lite's absorbed attention and of its experts.

    Decode (one launch) and prefill (two); the experts' tiles have one more size.
    """
    for name, depth, slices in (("qkv", 4096, 3), ("gate_up", 4096, 2), ("down", 14336, 1)):
        for dtype in (tl.bfloat16, tl.float32) if name == "qkv" else (tl.bfloat16,):
            yield from _configurations(f"{name} {dtype}", depth, slices, dtype)
    yield from _configurations("v2-lite absorbed query", 128, 16, tl.bfloat16, own_inputs=True)
    yield from _configurations("v2-lite expert gate_up", 2048, 2, tl.bfloat16, choices=6)
    yield from _configurations("v2-lite expert down", 1408, 1, tl.bfloat16, scatters=True)


def _configurations(
    name: str, depth: int, slices: int, dtype: tl.dtype, own_inputs: bool = False, choices: int = 0,
    scatters: bool = False,
) -> Iterator[Configuration]:  # fmt: skip
    pointer, itemsize = ("*bf16", 2) if dtype == tl.bfloat16 else ("*fp32", 4)
    types = dict(x=pointer, y=pointer, z="*fp32", bias=pointer, table="*i64", table_stride="i32", offsets="*i32",
                 pairs="*i32", tiles="*i32", num_tiles="*i32", counters="*i32", T="i32", max_rank="i32", stride_x="i32",
                 stride_y="i32", column_blocks="i32")  # fmt: skip
    aligned = ("x", "y", "z", "stride_x", "stride_y")
    in_experts = choices > 0 or scatters
    by_tile = [(16, "decode", (lora_kernel,)), (64, "prefill", (shrink_kernel, expand_kernel))]
    if in_experts:
        by_tile.append((32, "tile 32", (shrink_kernel, expand_kernel)))
    for tile, phase, kernels in by_tile:
        columns, block_depth, expand_warps = _blocks(tile, itemsize)
        constants = dict(K=depth, CHOICES=choices, SCATTERS=scatters, OWN=own_inputs, TRANSPOSED=own_inputs,
                         ALIGNED=not own_inputs, SL=slices, SPLITS=_splits(depth, tile, in_experts), TILE=tile,
                         RB=_RANKS, BN=columns, BK=block_depth, HAS_BIAS=False, DT=dtype)  # fmt: skip
        for kernel in kernels:
            used = {key: value for key, value in constants.items() if key in kernel.arg_names}
            present = tuple(argument for argument in aligned if argument in kernel.arg_names)
            title = {lora_kernel: phase, shrink_kernel: f"{phase} shrink", expand_kernel: f"{phase} expand"}[kernel]
            yield Configuration(f"{name} {title}", kernel, types, used, present,
                                expand_warps if kernel is expand_kernel else 4)  # fmt: skip
