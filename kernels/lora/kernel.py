"""Triton form of lora: one launch for all slices of a site, all adapters and all ranks of the batch.

At decode the cost of LoRA is launches and not bytes: an adapter of rank 16 adds half a percent to the weights that a
step reads. So there is one launch, whose programs take pieces of work by ticket. All shrinks (tile, slice, part of the
depth) come before all expands (tile, slice, block of columns). An expand loads what it can and then waits for the
shrinks of its tile and slice. Their tickets were taken before its own, by programs that are running, and a shrink waits
for nothing. So there is no deadlock, however few programs run at once, and no cooperative launch is needed.

Parts of the depth are stored apart and summed in a fixed order, so the result does not depend on timing. The program
that takes the last ticket sets the counters back to zero, so the launch can be replayed in a graph.

Adapters lie in memory at their true rank, and are walked in steps of 16 ranks, so nothing is padded to the highest rank
of the batch. At prefill two plain launches do the same work, first the shrinks and then the expands. Tests check the
two ways against the same reference.

y may be in float32 where x and the weights are not: products that are still to be activated are (grouped_gemm). The
sums are float32 in any case, and stored in y's type.

Inside routed experts the tiles are those that expert_tiles cut: in the place of a slot they have an entry, which says
the slot and the expert (EXPERTS). Their rows are positions; where x or y is in another order, it is found through the
pairs (CHOICES, SCATTERS).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.adapter_rows import FEW_TILE_ROWS, AdapterTiles
from kernels.compiled.kernel import Configuration, Tiles, multiprocessors, stages
from kernels.compiled.launch import launch
from kernels.expert_route import Routed
from kernels.expert_tiles import ExpertTiles
from kernels.lora.products.kernel import Table, expand, shrink
from kernels.lora.site import LoraSite, SiteAdapters

# with 128 columns sm_80 spills, and with 8 warps besides, half as many programs fit
DECODE_COLUMNS = 64  # of an expand at decode: one piece of work
RANKS = 16  # ranks at a time: a matrix instruction's
TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=["T", "max_rank", "column_blocks"])
def lora_kernel(
    x, stride_x, y, stride_y, z, bias, table, tiles, counters, T, max_rank, column_blocks,
    K: tl.constexpr, CHOICES: tl.constexpr, OWN: tl.constexpr, ALIGNED: tl.constexpr, BK: tl.constexpr,
    SCATTERS: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr, EXPERTS: tl.constexpr, TRANSPOSED: tl.constexpr,
    SL: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, RB: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """The single launch. counters: ticket, then arrivals of each (tile, slice)."""
    if tl.load(table.rows) == 0:  # no adapter acts at this site
        return
    count = tl.load(tiles.num_tiles)
    shrinks = count * SL * SPLITS
    total = shrinks + count * SL * column_blocks
    work = tl.atomic_add(counters, 1, sem="relaxed")
    while work < total:
        if work < shrinks:
            part = work // SPLITS % SL
            tile = work // (SPLITS * SL)
            rank = shrink(x, stride_x, z, table, tiles, tile, part, work % SPLITS, T, max_rank,
                          K, CHOICES, OWN, ALIGNED, BK, EXPERTS, TRANSPOSED, SL, SPLITS, TILE, RB, DT)  # fmt: skip
            if rank > 0:  # else nobody waits, and the arrival could land after the reset
                tl.debug_barrier()  # all threads' stores before the one thread's release
                tl.atomic_add(counters + 1 + tile * SL + part, 1, sem="release", scope="gpu")
        else:
            left = work - shrinks
            expand(y, stride_y, z, bias, table, tiles, counters, left // (column_blocks * SL),
                   left // column_blocks % SL, left % column_blocks, T, max_rank,
                   SCATTERS, BN, HAS_BIAS, True, EXPERTS, TRANSPOSED, SL, SPLITS, TILE, RB, DT)  # fmt: skip
        work = tl.atomic_add(counters, 1, sem="relaxed")
    # every program takes exactly one ticket beyond the work, after all its waits: the last of them resets
    if work == total + tl.num_programs(0) - 1:
        i = tl.arange(0, 128)
        for first in range(0, 1 + count * SL, 128):
            tl.store(counters + first + i, 0, mask=first + i < 1 + count * SL)


@triton.jit(do_not_specialize=["T", "max_rank"])
def shrink_kernel(
    x, stride_x, z, table, tiles, T, max_rank,
    K: tl.constexpr, CHOICES: tl.constexpr, OWN: tl.constexpr, ALIGNED: tl.constexpr, BK: tl.constexpr,
    EXPERTS: tl.constexpr, TRANSPOSED: tl.constexpr, SL: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr,
    RB: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """The first of two launches."""
    if tl.load(table.rows) == 0:
        return
    for work in range(tl.program_id(0), tl.load(tiles.num_tiles) * SL * SPLITS, tl.num_programs(0)):
        shrink(x, stride_x, z, table, tiles, work // (SPLITS * SL), work // SPLITS % SL, work % SPLITS, T, max_rank,
               K, CHOICES, OWN, ALIGNED, BK, EXPERTS, TRANSPOSED, SL, SPLITS, TILE, RB, DT)  # fmt: skip


@triton.jit(do_not_specialize=["T", "max_rank", "column_blocks"])
def expand_kernel(
    y, stride_y, z, bias, table, tiles, T, max_rank, column_blocks,
    SCATTERS: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr, EXPERTS: tl.constexpr, TRANSPOSED: tl.constexpr,
    SL: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr, RB: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """The second of two launches."""
    if tl.load(table.rows) == 0:
        return
    for work in range(tl.program_id(0), tl.load(tiles.num_tiles) * SL * column_blocks, tl.num_programs(0)):
        expand(y, stride_y, z, bias, table, tiles, tiles.num_tiles, work // (column_blocks * SL),
               work // column_blocks % SL, work % column_blocks, T, max_rank,
               SCATTERS, BN, HAS_BIAS, False, EXPERTS, TRANSPOSED, SL, SPLITS, TILE, RB, DT)  # fmt: skip


class Kind(NamedTuple):
    """What of a site, and of the order of its rows, a kernel is compiled for.

    experts: of a site of routed experts, how many there are, else 0. Their x is by token, of which each has `choices`
    pairs; or by position, where choices is 0, and y by pair number.
    """

    depth: int  # columns of x that a slice reads
    slices: int
    own_inputs: bool = False
    transposed: bool = False
    experts: int = 0
    choices: int = 0

    @property
    def scatters(self) -> bool:
        return self.experts > 0 and self.choices == 0

    def is_aligned(self, itemsize: int) -> bool:
        """Whether every matrix of a site begins at a multiple of 16 bytes. The first of an adapter's does."""
        return not self.own_inputs and (self.experts == 0 or self.depth * itemsize % 16 == 0)


def _constants(
    kind: Kind, tile: int, dtype: torch.dtype, has_bias: bool, columns: int, block_depth: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of shrinks and of expands; the single launch takes both. columns, block_depth: from `_blocks`."""
    both = dict(EXPERTS=kind.experts, TRANSPOSED=kind.transposed, SL=kind.slices,
                SPLITS=splits_of(kind.depth, tile, kind.experts > 0), TILE=tile, RB=RANKS,
                DT=TRITON_TYPES[dtype])  # fmt: skip
    shrinking = dict(K=kind.depth, CHOICES=kind.choices, OWN=kind.own_inputs, ALIGNED=kind.is_aligned(dtype.itemsize),
                     BK=block_depth, **both)  # fmt: skip
    return shrinking, dict(SCATTERS=kind.scatters, BN=columns, HAS_BIAS=has_bias, **both)


@launch("lora", mutates_args=("y", "counters"))
def _lora(
    y: Tensor, x: Tensor, table: Tensor, offsets: Tensor, bias: Tensor | None, tiles: Tensor, num_tiles: Tensor,
    counters: Tensor, widest: int, tile_rows: int, max_rank: int, own_inputs: bool, transposed: bool,
    single_launch: bool,
) -> None:  # fmt: skip
    slices = table.shape[1]
    kind = Kind(x.shape[1] // (slices if own_inputs else 1), slices, own_inputs, transposed)
    rows = Tiles(tiles, num_tiles, tiles)  # no pairs; an argument that is not read still needs a pointer
    _launch(y, x, Table(table, table.stride(0), offsets), bias, rows, counters, kind, widest, tile_rows, max_rank,
            single_launch)  # fmt: skip


@_lora.register_fake
def _(*_: object) -> None:
    return None


@launch("expert_lora", mutates_args=("y", "counters"))
def _expert_lora(
    y: Tensor, x: Tensor, table: Tensor, offsets: Tensor, pairs: Tensor, tiles: Tensor, num_tiles: Tensor,
    counters: Tensor, widest: int, tile_rows: int, max_rank: int, experts: int, choices: int, transposed: bool,
    single_launch: bool,
) -> None:  # fmt: skip
    """experts, choices: as in Kind."""
    kind = Kind(x.shape[1], table.shape[1], False, transposed, experts, choices)
    _launch(y, x, Table(table, table.stride(0), offsets), None, Tiles(tiles, num_tiles, pairs), counters, kind, widest,
            tile_rows, max_rank, single_launch)  # fmt: skip


@_expert_lora.register_fake
def _(*_: object) -> None:
    return None


def _launch(
    y: Tensor, x: Tensor, table: Table, bias: Tensor | None, tiles: Tiles, counters: Tensor, kind: Kind, widest: int,
    tile_rows: int, max_rank: int, single_launch: bool,
) -> None:  # fmt: skip
    """widest: the most columns of a slice."""
    column_width, block_depth, expand_warps = _blocks(tile_rows, x.itemsize)
    shrinking, expanding = _constants(kind, tile_rows, x.dtype, bias is not None, column_width, block_depth)
    column_blocks = triton.cdiv(widest, column_width)
    rows, most, splits = y.shape[0], len(tiles.tiles), shrinking["SPLITS"]
    z = torch.empty(splits, kind.slices, rows, max_rank, dtype=torch.float32, device=x.device)
    held = y if bias is None else bias  # an argument that is not read still needs a pointer
    shrinks, expands = most * kind.slices * splits, most * kind.slices * column_blocks
    programs, num_stages = 2 * multiprocessors(x), stages(3)
    if single_launch:
        lora_kernel[(min(shrinks + expands, programs),)](
            x, x.stride(0), y, y.stride(0), z, held, table, tiles, counters, rows, max_rank, column_blocks,
            **(shrinking | expanding), num_warps=4, num_stages=num_stages,
        )  # fmt: skip
        return
    shrink_kernel[(min(shrinks, 4 * programs),)](
        x, x.stride(0), z, table, tiles, rows, max_rank, **shrinking, num_warps=4, num_stages=num_stages
    )
    expand_kernel[(min(expands, 4 * programs),)](
        y, y.stride(0), z, held, table, tiles, rows, max_rank, column_blocks, **expanding, num_warps=expand_warps,
        num_stages=num_stages,
    )  # fmt: skip


@launch("lora_shrink")
def _shrink(
    x: Tensor, table: Tensor, offsets: Tensor, tiles: Tensor, num_tiles: Tensor, tile_rows: int, max_rank: int
) -> Tensor:
    kind = Kind(x.shape[1], table.shape[1])
    _, block_depth, _ = _blocks(tile_rows, x.itemsize)
    constants, _ = _constants(kind, tile_rows, x.dtype, False, 0, block_depth)
    z = _new_z(x, table, tile_rows, max_rank)
    shrinks = len(tiles) * kind.slices * constants["SPLITS"]
    shrink_kernel[(min(shrinks, 8 * multiprocessors(x)),)](
        x, x.stride(0), z, Table(table, table.stride(0), offsets), Tiles(tiles, num_tiles, tiles), x.shape[0], max_rank,
        **constants, num_warps=4, num_stages=stages(3),
    )  # fmt: skip
    return z


@_shrink.register_fake
def _(
    x: Tensor, table: Tensor, offsets: Tensor, tiles: Tensor, num_tiles: Tensor, tile_rows: int, max_rank: int
) -> Tensor:
    return _new_z(x, table, tile_rows, max_rank)


def _new_z(x: Tensor, table: Tensor, tile_rows: int, max_rank: int) -> Tensor:
    return x.new_empty(
        splits_of(x.shape[1], tile_rows), table.shape[1], x.shape[0], max_rank, dtype=torch.float32
    )  # fmt: skip


def shrunk(x: Tensor, adapters: SiteAdapters, tiles: AdapterTiles, max_rank: int) -> Tensor:
    """As z of a Delta."""
    assert adapters.table is not None and adapters.offsets is not None
    assert tiles.tiles is not None and tiles.num_tiles is not None
    return _shrink(x, adapters.table, adapters.offsets, tiles.tiles, tiles.num_tiles, tiles.tile_rows, max_rank)


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
    tiles: ExpertTiles,
    gathers: bool,
    max_rank: int,
    counters: Tensor,
    single_launch: bool | None = None,
) -> None:
    """As in reference.py. counters: zero, and left zero. single_launch as in lora, and only if there are enough of them
    to count the arrivals of each (tile, slice)."""
    assert adapters.table is not None and adapters.offsets is not None
    assert site.experts and not site.own_inputs
    enough = counters.numel() > len(tiles.tiles) * len(site.widths)
    if single_launch is None:
        single_launch = tiles.tile_rows <= FEW_TILE_ROWS and enough
    assert enough or not single_launch
    _expert_lora(y, x, adapters.table, adapters.offsets, routed.pairs, tiles.tiles, tiles.num_tiles, counters,
                 max(site.widths), tiles.tile_rows, max_rank, site.experts, routed.places.shape[1] if gathers else 0,
                 site.transposed, single_launch)  # fmt: skip


def _blocks(tile: int, itemsize: int) -> tuple[int, int, int]:
    """Columns of an expand, depth of a shrink's step, warps of an expand."""
    return (DECODE_COLUMNS, 256 // itemsize, 4) if tile <= 16 else (64, 128 // itemsize, 8)


def splits_of(depth: int, tile: int, in_experts: bool = False) -> int:
    """Parts of the depth: so many that one adapter's shrinks fill a quarter of the machine; one at prefill.

    Two inside experts, of which even a single token has several; four would spill on sm_80.
    """
    return min(2 if in_experts else 8, max(1, depth // 512)) if tile <= 16 else 1


def configurations() -> Iterator[Configuration]:
    """Sites of Llama-3.1-8B, one of Qwen2-7B, whose linear has a bias (which gains are told), of DeepSeek-V2-Lite's
    absorbed attention and experts, and of gpt-oss's experts.

    Decode (one launch) and prefill (two); the experts' tiles have one more size.
    """
    for name, depth, slices in (("qkv", 4096, 3), ("gate_up", 4096, 2), ("down", 14336, 1)):
        for dtype in (torch.bfloat16, torch.float32) if name == "qkv" else (torch.bfloat16,):
            yield from _configurations(f"{name} {TRITON_TYPES[dtype]}", Kind(depth, slices), dtype)
    yield from _configurations("qwen2 qkv with bias", Kind(3584, 3), torch.bfloat16, has_bias=True)
    yield from _configurations("v2-lite gains before absorbed query", Kind(128, 16, True), torch.bfloat16)
    yield from _configurations("v2-lite absorbed query", Kind(128, 16, True, True), torch.bfloat16)
    yield from _configurations("v2-lite absorbed value", Kind(512, 16, True), torch.bfloat16)
    for name, experts, choices, hidden, inner, slices in (("v2-lite", 64, 8, 2048, 1408, 2),
                                                          ("gpt-oss", 128, 4, 2880, 2880, 1)):  # fmt: skip
        up, down = Kind(hidden, slices, experts=experts, choices=choices), Kind(inner, 1, experts=experts)
        yield from _configurations(f"{name} expert gate_up", up, torch.bfloat16)
        yield from _configurations(f"{name} expert down", down, torch.bfloat16)


def _configurations(name: str, kind: Kind, dtype: torch.dtype, has_bias: bool = False) -> Iterator[Configuration]:
    pointer = "*bf16:16" if dtype == torch.bfloat16 else "*fp32:16"
    y = "*fp32:16" if kind.choices else pointer  # products before the activation
    # a step counts the tiles of linears among its other integers, expert_tiles in a tensor of its own
    num_tiles = "*i32:16" if kind.experts else "*i32"
    types = dict(x=pointer, y=y, z="*fp32:16", bias=pointer if has_bias else y, stride_x="i32:16", stride_y="i32:16",
                 table=Table("*i64:16", "i32", "*i32:16"), tiles=Tiles("*i32:16", num_tiles, "*i32:16"),
                 counters="*i32:16", T="i32", max_rank="i32", column_blocks="i32")  # fmt: skip
    for tile, phase in ((16, "decode"), (64, "prefill"), (32, "tile 32")):
        columns, block_depth, expand_warps = _blocks(tile, dtype.itemsize)
        shrinking, expanding = _constants(kind, tile, dtype, has_bias, columns, block_depth)
        if tile == 16:
            yield Configuration(f"{name} {phase}", lora_kernel, types, shrinking | expanding)
        elif tile == 64 or kind.experts:
            yield Configuration(f"{name} {phase} shrink", shrink_kernel, types, shrinking)
            yield Configuration(f"{name} {phase} expand", expand_kernel, types, expanding, expand_warps)
