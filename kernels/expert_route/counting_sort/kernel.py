"""Triton form of the counting sort: three launches, linear in the pairs, and one before them where there are adapters.

Blocks of tokens choose, and count their pairs by column; a scan over blocks and columns makes offsets of the counts;
each pair is then written to its position. The order does not depend on timing.

A column is a place, but those of adapters that have no token in the step are left out (the launch before): there may be
a thousand adapters, and their places fifty times those of the base.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration, Tiles
from kernels.expert_route.choice.kernel import Chosen, Tokens, choose_block

_SCAN = dict(BV=16, BB=64, BW=1024)  # columns and blocks at a time; columns at a time of the last program
_SCAN_PROGRAMS = 512  # at most
_RANK_TOKENS = 2048  # at a time
_SCATTER_PAIRS = 256  # of a program of the third launch
_COUNT_WARPS = 8


def count_tokens(experts: int) -> int:
    """Tokens of a block: as many scores as the registers of eight warps hold."""
    return max(1, min(32, 2048 // triton.next_power_of_2(experts)))


@triton.jit(do_not_specialize=["T", "SLOTS"])
def rank_kernel(slots, ranks, T, SLOTS, SP: tl.constexpr, BT: tl.constexpr):
    """ranks [SLOTS + 1]: how many adapters with a token have a lower slot; the last entry, how many there are.

    slots [T]: of each token, below SLOTS. A single program; SP is a power of two above SLOTS.
    """
    slot = tl.arange(0, SP)
    tl.store(ranks + slot, 0, mask=slot <= SLOTS)
    tl.debug_barrier()
    for first in range(0, T, BT):
        t = first + tl.arange(0, BT)
        its = tl.load(slots + t, mask=t < T, other=0)
        tl.store(ranks + its, 1, mask=its > 0)
    tl.debug_barrier()
    used = tl.load(ranks + slot, mask=slot < SLOTS, other=0, cache_modifier=".cg")
    tl.store(ranks + slot, tl.cumsum(used, 0) - used, mask=slot <= SLOTS)


@triton.jit
def _num_columns(ranks, SLOTS, BASE, ROOM, HAS_ADAPTERS: tl.constexpr):
    """The base's places, and the rooms of the adapters that have a token."""
    if HAS_ADAPTERS:
        return BASE + tl.load(ranks + SLOTS) * ROOM
    else:
        return BASE


@triton.jit
def _columns(places, slots, ranks, t, BASE, ROOM, HAS_ADAPTERS: tl.constexpr):
    """Of the places of tokens t. They are in the order of places, since rooms are in the order of slots."""
    if HAS_ADAPTERS:
        is_own = places >= BASE
        slot = tl.load(slots + t, mask=is_own, other=0)
        return places - tl.where(is_own, slot - 1 - tl.load(ranks + slot, mask=is_own, other=0), 0) * ROOM
    else:
        return places


@triton.jit(do_not_specialize=["T", "SLOTS", "BASE", "ROOM"])
def count_kernel(
    tokens, chosen, within, counts, ranks, T, SLOTS, BASE, ROOM,
    M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, SCORE: tl.constexpr,
    RENORM: tl.constexpr, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, G: tl.constexpr, TOP_G: tl.constexpr,
    TOP2: tl.constexpr, HAS_ADAPTERS: tl.constexpr, HAS_PADDING: tl.constexpr, MAP: tl.constexpr,
    SHARED: tl.constexpr, ONLY_OWN: tl.constexpr,
):  # fmt: skip
    """First launch: choose, and count this block's pairs by column. Programs: blocks of BT tokens.

    within [T * K] int32: earlier pairs of the same place in the same block. counts [blocks + 1, V] int32, V columns.
    BASE: the places of the base; ROOM: those of each adapter, which lie at BASE + (slot - 1) * ROOM.
    """
    block = tl.program_id(0)
    V = _num_columns(ranks, SLOTS, BASE, ROOM, HAS_ADAPTERS)
    its_counts = counts + block.to(tl.int64) * V
    for first_column in range(0, V, BT * KP):
        column = first_column + tl.arange(0, BT * KP)
        tl.store(its_counts + column, 0, mask=column < V)
    choose_block(block, tokens, chosen, T, M, MP, K, KP, BT, SCORE, RENORM, SCALE, HAS_BIAS, G, TOP_G, TOP2,
                 HAS_ADAPTERS, HAS_PADDING, MAP, SHARED, ONLY_OWN)  # fmt: skip
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
    column = _columns(mine, tokens.slots, ranks, p // K, BASE, ROOM, HAS_ADAPTERS)
    tl.store(its_counts + column, same, mask=real & (before == 0))


@triton.jit(do_not_specialize=["BLOCKS", "SLOTS", "BASE", "ROOM"])
def scan_kernel(
    counts, starts, first_tiles, num_tiles, counters, ranks, BLOCKS, SLOTS, BASE, ROOM,
    HAS_ADAPTERS: tl.constexpr, TILE: tl.constexpr, BV: tl.constexpr, BB: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Second launch: counts become each block's offset within its place, and behind the BLOCKS stand the place's
    totals; the last program scans over the columns.

    starts, first_tiles [V]: first position and first tile of each column's place.
    """
    V = _num_columns(ranks, SLOTS, BASE, ROOM, HAS_ADAPTERS)
    for first_column in range(tl.program_id(0) * BV, V, tl.num_programs(0) * BV):
        v = first_column + tl.arange(0, BV)
        total = tl.zeros((BV,), tl.int32)
        b = tl.arange(0, BB)
        for first in range(0, BLOCKS, BB):  # many blocks at once: one after another would each wait for memory
            at = counts + (first + b).to(tl.int64)[:, None] * V + v[None, :]
            mask = (first + b < BLOCKS)[:, None] & (v < V)[None, :]
            count = tl.load(at, mask=mask, other=0)
            tl.store(at, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
            total += tl.sum(count, 0)
        tl.store(counts + BLOCKS.to(tl.int64) * V + v, total, mask=v < V)
        tl.store(starts + v, total, mask=v < V)  # until the last program scans
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
        tl.store(num_tiles + 1, position)
        tl.store(counters, 0)


@triton.jit(do_not_specialize=["T", "BLOCKS", "SLOTS", "BASE", "ROOM"])
def scatter_kernel(
    places, slots, within, counts, starts, first_tiles, tiles, ranks, T, BLOCKS, SLOTS, BASE, ROOM,
    HAS_ADAPTERS: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Third launch: write each pair to its position, and every TILE-th of a place opens a tile."""
    V = _num_columns(ranks, SLOTS, BASE, ROOM, HAS_ADAPTERS)
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    mine = tl.load(places + p, mask=p < T * K, other=-1)
    real = mine >= 0
    v = _columns(mine, slots, ranks, p // K, BASE, ROOM, HAS_ADAPTERS)
    block = (p // (BT * K)).to(tl.int64)
    rank = tl.load(counts + block * V + v, mask=real, other=0) + tl.load(within + p, mask=real, other=0)
    position = tl.load(starts + v, mask=real, other=0) + rank
    tl.store(tiles.pairs + position, p, mask=real)
    opens = real & (rank % TILE == 0)
    size = tl.load(counts + BLOCKS.to(tl.int64) * V + v, mask=opens, other=0)
    tile = tl.load(first_tiles + v, mask=opens, other=0) + rank // TILE
    tl.store(tiles.tiles + tile * 3, mine, mask=opens)
    tl.store(tiles.tiles + tile * 3 + 1, position, mask=opens)
    tl.store(tiles.tiles + tile * 3 + 2, tl.minimum(size - rank, TILE), mask=opens)


def route_and_sort(
    tokens: Tokens, chosen: Chosen, tiles: Tiles, counters: Tensor, rule: dict[str, int | float], num_places: int,
    tile_rows: int,
) -> None:  # fmt: skip
    """The launches. Writes `chosen` and `tiles`; counters as in TokenBatch."""
    count, experts = tokens.logits.shape
    block_tokens = count_tokens(experts)
    blocks = triton.cdiv(count, block_tokens)
    slots, base = tokens.expert_map.shape  # the base's among the slots
    room = (num_places - base) // max(1, slots - 1)
    assert base + (slots - 1) * room == num_places, "every adapter has as much room in the stack"
    most = base + min(slots - 1, count) * room

    def ints(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=tokens.logits.device)

    within, counts, starts, first_tiles = ints(len(tiles.pairs)), ints(blocks + 1, most), ints(most), ints(most)
    ranks, has_adapters = ints(slots + 1), rule["HAS_ADAPTERS"]
    stack = (slots, base, room)
    if has_adapters:
        rank_kernel[(1,)](tokens.slots, ranks, count, slots, SP=_above(slots), BT=_RANK_TOKENS, num_warps=_COUNT_WARPS)
    count_kernel[(blocks,)](
        tokens, chosen, within, counts, ranks, count, *stack, **rule, BT=block_tokens, num_warps=_COUNT_WARPS
    )
    scan_kernel[(min(_SCAN_PROGRAMS, triton.cdiv(most, _SCAN["BV"])),)](
        counts, starts, first_tiles, tiles.num_tiles, counters, ranks, blocks, *stack, HAS_ADAPTERS=has_adapters,
        TILE=tile_rows, **_SCAN,
    )  # fmt: skip
    scatter_kernel[(triton.cdiv(len(tiles.pairs), _SCATTER_PAIRS),)](
        chosen.places, tokens.slots, within, counts, starts, first_tiles, tiles, ranks, count, blocks, *stack,
        HAS_ADAPTERS=has_adapters, K=rule["K"], BT=block_tokens, BP=_SCATTER_PAIRS, TILE=tile_rows,
    )  # fmt: skip


def _above(number: int) -> int:
    """The least power of two that is larger."""
    return 1 << number.bit_length()


def configurations(
    types: dict[str, Tokens | Chosen], rules: dict[str, dict[str, int | float]]
) -> Iterator[Configuration]:
    """types: of tokens and chosen. rules: by name of the model. The slots are a thousand."""
    stack = {"ranks": "*i32:16", "SLOTS": "i32", "BASE": "i32", "ROOM": "i32"}
    ranking = {"slots": "*i32:16", "ranks": "*i32:16", "T": "i32", "SLOTS": "i32"}
    yield Configuration("rank", rank_kernel, ranking, dict(SP=1024, BT=_RANK_TOKENS), _COUNT_WARPS)
    for name, rule in rules.items():
        constants = {**rule, "BT": count_tokens(int(rule["M"]))}
        counting = {**types, **stack, "within": "*i32:16", "counts": "*i32:16", "T": "i32"}
        yield Configuration(f"{name} count", count_kernel, counting, constants, _COUNT_WARPS)
    found = {name: "*i32:16" for name in ("counts", "starts", "first_tiles")} | stack | {"BLOCKS": "i32"}
    scanning = {**found, "num_tiles": "*i32:16", "counters": "*i32:16"}
    yield Configuration("scan", scan_kernel, scanning, dict(HAS_ADAPTERS=True, TILE=128, **_SCAN))
    tiles = Tiles("*i32:16", "*i32:16", "*i32:16")
    scattering = {**found, "places": "*i32:16", "slots": "*i32:16", "within": "*i32:16", "tiles": tiles, "T": "i32"}
    yield Configuration(
        "scatter", scatter_kernel, scattering,
        dict(HAS_ADAPTERS=True, K=8, BT=count_tokens(64), BP=_SCATTER_PAIRS, TILE=128),
    )  # fmt: skip
