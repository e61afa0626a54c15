"""Triton form of the counting sort: three launches, linear in the pairs.

Blocks of tokens choose, and count their pairs by place; a scan over blocks and places makes offsets of the counts; each
pair is then written to its position. The order does not depend on timing.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration, Tiles
from kernels.expert_route.choice.kernel import Chosen, Tokens, choose_block

_SCAN = dict(BV=64, BB=16, BW=1024)  # places a program, blocks at a time; places at a time of the last program
_SCATTER_PAIRS = 256  # of a program of the third launch
_COUNT_WARPS = 8


def count_tokens(experts: int) -> int:
    """Tokens of a block: as many scores as the registers of eight warps hold."""
    return max(1, min(32, 2048 // triton.next_power_of_2(experts)))


@triton.jit(do_not_specialize=["T", "V"])
def count_kernel(
    tokens, chosen, within, counts, T, V,
    M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, SCORE: tl.constexpr,
    RENORM: tl.constexpr, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, G: tl.constexpr, TOP_G: tl.constexpr,
    TOP2: tl.constexpr, HAS_ADAPTERS: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    """First launch: choose, and count this block's pairs by place. Programs: blocks of BT tokens.

    within [T * K] int32: earlier pairs of the same place in the same block. counts [blocks + 1, V] int32, V places:
    zero on entry.
    """
    block = tl.program_id(0)
    choose_block(block, tokens, chosen, T, M, MP, K, KP, BT, SCORE, RENORM, SCALE, HAS_BIAS, G, TOP_G, TOP2,
                 HAS_ADAPTERS, HAS_PADDING)  # fmt: skip
    tl.debug_barrier()  # the places are read back below in another layout
    i = tl.arange(0, BT * KP)
    first = block * BT * K
    p = first + i
    valid = (i < BT * K) & (p < T * K)
    mine = tl.load(chosen.places + p, mask=valid, other=-1, cache_modifier=".cg")
    before = tl.zeros((BT * KP,), tl.int32)
    same = tl.zeros((BT * KP,), tl.int32)
    for start in range(0, BT * KP, 32):
        j = start + tl.arange(0, 32)
        other = tl.load(
            chosen.places + first + j, mask=(j < BT * K) & (first + j < T * K), other=-1, cache_modifier=".cg"
        )
        equal = other[None, :] == mine[:, None]
        before += tl.sum((equal & (j[None, :] < i[:, None])).to(tl.int32), 1)
        same += tl.sum(equal.to(tl.int32), 1)
    real = valid & (mine >= 0)
    tl.store(within + p, before, mask=real)
    tl.store(counts + block * V + mine, same, mask=real & (before == 0))


@triton.jit(do_not_specialize=["BLOCKS", "V"])
def scan_kernel(
    counts, starts, first_tiles, num_tiles, counters, BLOCKS, V, TILE: tl.constexpr, BV: tl.constexpr,
    BB: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Second launch: counts become each block's offset within its place; the last program scans over the places.

    starts, first_tiles [V]: first position and first tile of each place.
    """
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    total = tl.zeros((BV,), tl.int32)
    b = tl.arange(0, BB)
    for first in range(0, BLOCKS, BB):  # many blocks at once: one after another would each wait for memory
        at = counts + (first + b).to(tl.int64)[:, None] * V + v[None, :]
        mask = (first + b < BLOCKS)[:, None] & (v < V)[None, :]
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        total += tl.sum(count, 0)
    tl.store(starts + v, total, mask=v < V)  # the place's total until the last program scans
    tl.debug_barrier()
    if tl.atomic_add(counters, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.debug_barrier()
        position = 0
        tile = 0
        for first in range(0, V, BW):
            u = first + tl.arange(0, BW)
            size = tl.load(starts + u, mask=u < V, other=0, cache_modifier=".cg")
            cut = (size + TILE - 1) // TILE
            tl.store(starts + u, position + tl.cumsum(size, 0) - size, mask=u < V)
            tl.store(first_tiles + u, tile + tl.cumsum(cut, 0) - cut, mask=u < V)
            position += tl.sum(size, 0)
            tile += tl.sum(cut, 0)
        tl.store(num_tiles, tile)
        tl.store(counters, 0)


@triton.jit(do_not_specialize=["T", "V", "LAST_BLOCK"])
def scatter_kernel(
    places, within, counts, starts, first_tiles, tiles, T, V, LAST_BLOCK,
    K: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Third launch: write each pair to its position, and every TILE-th of a place opens a tile.

    A place's size is its offset in the block after the last one, which the first launch left empty.
    """
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    mine = tl.load(places + p, mask=p < T * K, other=-1)
    real = mine >= 0
    block = p // (BT * K)
    rank = tl.load(counts + block * V + mine, mask=real, other=0) + tl.load(within + p, mask=real, other=0)
    position = tl.load(starts + mine, mask=real, other=0) + rank
    tl.store(tiles.pairs + position, p, mask=real)
    opens = real & (rank % TILE == 0)
    size = tl.load(counts + LAST_BLOCK * V + mine, mask=opens, other=0)
    tile = tl.load(first_tiles + mine, mask=opens, other=0) + rank // TILE
    tl.store(tiles.tiles + tile * 3, mine, mask=opens)
    tl.store(tiles.tiles + tile * 3 + 1, position, mask=opens)
    tl.store(tiles.tiles + tile * 3 + 2, tl.minimum(size - rank, TILE), mask=opens)


def route_and_sort(
    tokens: Tokens, chosen: Chosen, tiles: Tiles, counters: Tensor, rule: dict[str, int | float], num_places: int,
    tile_rows: int,
) -> None:  # fmt: skip
    """The three launches. Writes `chosen` and `tiles`; counters as in TokenBatch."""
    count, experts = tokens.logits.shape
    block_tokens = count_tokens(experts)
    blocks = triton.cdiv(count, block_tokens)
    device = tokens.logits.device
    within = torch.empty_like(tiles.pairs)
    counts = torch.zeros(blocks + 1, num_places, dtype=torch.int32, device=device)
    starts, first_tiles = torch.empty(2, num_places, dtype=torch.int32, device=device)
    count_kernel[(blocks,)](
        tokens, chosen, within, counts, count, num_places, **rule, BT=block_tokens, num_warps=_COUNT_WARPS
    )
    scan_kernel[(triton.cdiv(num_places, _SCAN["BV"]),)](
        counts, starts, first_tiles, tiles.num_tiles, counters, blocks + 1, num_places, TILE=tile_rows, **_SCAN
    )
    scatter_kernel[(triton.cdiv(len(tiles.pairs), _SCATTER_PAIRS),)](
        chosen.places, within, counts, starts, first_tiles, tiles, count, num_places, blocks, K=rule["K"],
        BT=block_tokens, BP=_SCATTER_PAIRS, TILE=tile_rows,
    )  # fmt: skip


def configurations(
    types: dict[str, Tokens | Chosen], rules: dict[str, dict[str, int | float]]
) -> Iterator[Configuration]:
    """types: of tokens and chosen. rules: by name of the model."""
    sizes = {"T": "i32", "V": "i32"}
    for name, rule in rules.items():
        constants = {**rule, "BT": count_tokens(int(rule["M"]))}
        counting = {**types, "within": "*i32:16", "counts": "*i32:16", **sizes}
        yield Configuration(f"{name} count", count_kernel, counting, constants, _COUNT_WARPS)
    found = {name: "*i32:16" for name in ("counts", "starts", "first_tiles")}
    scanning = {**found, "num_tiles": "*i32:16", "counters": "*i32:16", "BLOCKS": "i32", "V": "i32"}
    yield Configuration("scan", scan_kernel, scanning, dict(TILE=64, **_SCAN))
    tiles = Tiles("*i32:16", "*i32:16", "*i32:16")
    scattering = {**found, "places": "*i32:16", "within": "*i32:16", "tiles": tiles, **sizes, "LAST_BLOCK": "i32"}
    yield Configuration(
        "scatter", scatter_kernel, scattering, dict(K=6, BT=count_tokens(64), BP=_SCATTER_PAIRS, TILE=64)
    )
