"""Triton form of expert_tiles: each program walks over tiles and cuts them, a tile at a time.

A row opens a run where its slot is another than the row's before it; the run ends before the next row that does. Runs
that are kept get places in the output by one atomic addition for each tile. No two programs cut the same tile, so what
is cut does not depend on timing, only the order in which it is listed.

A tile of more rows than lora's are high is cut there too.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from kernels.adapter_rows import MANY_TILE_ROWS
from kernels.compiled.kernel import Configuration, Tiles, chip_of, open_tile
from kernels.compiled.launch import launch
from kernels.expert_route import Routed
from kernels.expert_tiles import ExpertTiles

_PROGRAMS = 4  # of a multiprocessor


@triton.jit
def cut_kernel(
    routed, slots, cut, num_cut, M: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Cut the tiles of `routed`, with places below M, where slots[pair // K] changes; append to `cut` [P, 3] int32.

    A tile is PARTS times ROWS rows high, and cut between those too. num_cut [1] int32: zero on entry.
    """
    m = tl.arange(0, ROWS)
    for part in range(tl.program_id(0), tl.load(routed.num_tiles) * PARTS, tl.num_programs(0)):
        place, start, count = open_tile(routed, part // PARTS)
        start += part % PARTS * ROWS
        count = tl.minimum(count - part % PARTS * ROWS, ROWS)
        if (place < M) & (count > 0):
            pairs = routed.pairs + start + m
            slot = tl.load(slots + tl.load(pairs, mask=m < count, other=0) // K, mask=m < count, other=0)
            later = (m > 0) & (m < count)
            before = tl.load(slots + tl.load(pairs - 1, mask=later, other=0) // K, mask=later, other=-1)
            opens = (m < count) & (slot != before)
            following = opens[None, :] & (m[None, :] > m[:, None])
            end = tl.min(tl.where(following, m[None, :], count), 1)
            kept = (opens & (slot > 0)).to(tl.int32)
            first = tl.atomic_add(num_cut, tl.sum(kept), sem="relaxed")
            at = cut + (first + tl.cumsum(kept) - kept) * 3
            tl.store(at, slot * M + place, mask=kept > 0)
            tl.store(at + 1, start + m, mask=kept > 0)
            tl.store(at + 2, end - m, mask=kept > 0)


@launch("expert_tiles")
def _expert_tiles(
    pairs: Tensor, tiles: Tensor, num_tiles: Tensor, slots: Tensor, num_experts: int, top_k: int, tile_rows: int
) -> tuple[Tensor, Tensor]:
    cut = pairs.new_empty(len(pairs), 3)  # a row is in one tile only
    num_cut = pairs.new_zeros(1)
    cut_kernel[(min(len(tiles), _PROGRAMS * chip_of(pairs.device).multiprocessors),)](
        Tiles(tiles, num_tiles, pairs), slots, cut, num_cut, **_constants(num_experts, top_k, tile_rows),
        num_warps=_warps(tile_rows),
    )  # fmt: skip
    return cut, num_cut


@_expert_tiles.register_fake
def _(pairs: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return pairs.new_empty(len(pairs), 3), pairs.new_empty(1)


def expert_tiles(routed: Routed, slots: Tensor, num_experts: int) -> ExpertTiles:
    """As in reference.py."""
    top_k = routed.places.shape[1]
    cut = _expert_tiles(routed.pairs, routed.tiles, routed.num_tiles, slots, num_experts, top_k, routed.tile_rows)
    return ExpertTiles(*cut, min(routed.tile_rows, MANY_TILE_ROWS))


def _constants(num_experts: int, top_k: int, tile_rows: int) -> dict[str, int]:
    rows = min(tile_rows, MANY_TILE_ROWS)
    return dict(M=num_experts, K=top_k, ROWS=rows, PARTS=tile_rows // rows)


def _warps(tile_rows: int) -> int:
    """Each row is compared with each: a warp for every 16 rows."""
    return max(1, min(tile_rows, MANY_TILE_ROWS) // 16)


def configurations() -> Iterator[Configuration]:
    """DeepSeek-V2-Lite, all tiles; gpt-oss-120b, the largest. Models differ in what is divided by only."""
    types = dict(routed=Tiles("*i32:16", "*i32:16", "*i32:16"), slots="*i32:16", cut="*i32:16", num_cut="*i32:16")
    for name, num_experts, top_k, tiles in (("v2-lite", 64, 8, (16, 32, 64, 128)), ("gpt-oss", 128, 4, (128,))):
        for tile in tiles:
            constants = _constants(num_experts, top_k, tile)
            yield Configuration(f"{name} tile {tile}", cut_kernel, types, constants, _warps(tile))
