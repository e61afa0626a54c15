"""Triton form of expert_route.

Decode: one launch. Programs take work by ticket: first blocks of tokens (scores, top-k, reroute), then blocks of pairs
(sort and tiles). A pair's position is counted, not sorted: the pairs with a smaller place, and those before it with the
same one. That is quadratic in the pairs and still the cheapest for a few thousand; it needs no histogram over
places, no padding ids, and its order does not depend on timing. A program that holds a block of pairs waits only for
tickets that running programs took and that never wait, so there is no deadlock however few programs run at once.

Prefill: counting sort in three launches (blocks of tokens count their pairs by place, a scan over blocks and
places, a scatter), linear in the pairs.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration
from kernels.expert_route.routing import GroupScore, Routed, Routing, TokenBatch, max_tiles

_BLOCK_PAIRS = 32  # pairs put in order by one piece of work
_BLOCK_OTHERS = 64  # pairs that it compares them with at a time
_QUADRATIC = 4096  # pairs up to which counting is cheaper than the counting sort's launches; counts fit into 16 bits
_SCAN = dict(BV=64, BB=16, BW=1024)  # places a program, blocks at a time; places at a time of the last program


def _decode_tokens(experts: int) -> int:
    """Tokens of one piece of work: as many scores as the registers of four warps hold."""
    return max(1, min(4, 512 // triton.next_power_of_2(experts)))


def _count_tokens(experts: int) -> int:
    return max(1, min(32, 2048 // triton.next_power_of_2(experts)))


@triton.jit
def _choose(
    logits, bias, t, in_batch,
    M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SCORE: tl.constexpr, RENORM: tl.constexpr,
    SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, G: tl.constexpr, TOP_G: tl.constexpr, TOP2: tl.constexpr,
):  # fmt: skip
    """Weights and expert ids [BT, KP] of tokens t [BT]; M experts padded to MP, K choices padded to KP."""
    e = tl.arange(0, MP)
    kk = tl.arange(0, KP)
    none = float("-inf")
    x = tl.load(logits + t[:, None] * M + e[None, :], mask=in_batch[:, None] & (e < M)[None, :], other=none)
    x = x.to(tl.float32)
    x = tl.where((x == x) & in_batch[:, None], x, none)  # a NaN compares with nothing, and could choose the padding
    x = tl.minimum(x, 1e30)
    if SCORE == 0:
        p = tl.exp(x - tl.maximum(tl.max(x, 1), -1e30)[:, None])
        scores = p / tl.maximum(tl.sum(p, 1), 1e-30)[:, None]
    elif SCORE == 1:
        scores = tl.sigmoid(x)
    else:
        scores = x
    ranked = scores
    if HAS_BIAS:
        ranked = ranked + tl.load(bias + e, mask=e < M, other=0.0).to(tl.float32)[None, :]
    ranked = tl.where((e < M)[None, :], ranked, none)
    if G > 1:
        group = e // (M // G)
        gg = tl.arange(0, 16)  # as many groups as any model has
        best = tl.full((t.shape[0], 16), none, tl.float32)
        for g in tl.static_range(G):
            inside = tl.where((group == g)[None, :], ranked, none)
            value, at = tl.max(inside, 1, return_indices=True, return_indices_tie_break_left=True)
            if TOP2:
                value += tl.max(tl.where(e[None, :] == at[:, None], none, inside), 1)
            best = tl.where((gg == g)[None, :], value[:, None], best)
        allowed = tl.zeros((t.shape[0], MP), tl.int1)
        for _ in tl.static_range(TOP_G):
            _, at = tl.max(best, 1, return_indices=True, return_indices_tie_break_left=True)
            allowed = allowed | (group[None, :] == at[:, None])
            best = tl.where(gg[None, :] == at[:, None], none, best)
        ranked = tl.where(allowed, ranked, none)
    weights = tl.full((t.shape[0], KP), none if SCORE == 2 else 0.0, tl.float32)
    ids = tl.zeros((t.shape[0], KP), tl.int32)
    for j in tl.static_range(K):
        _, at = tl.max(ranked, 1, return_indices=True, return_indices_tie_break_left=True)
        at = tl.minimum(at, M - 1)  # nothing is left where every score is infinite; stay inside the expert map
        chosen = e[None, :] == at[:, None]
        weight = tl.sum(tl.where(chosen, scores, 0.0), 1)
        weights = tl.where((kk == j)[None, :], weight[:, None], weights)
        ids = tl.where((kk == j)[None, :], at[:, None].to(tl.int32), ids)
        ranked = tl.where(chosen, none, ranked)
    if SCORE == 2:
        weights = tl.exp(weights - tl.maximum(tl.max(weights, 1), -1e30)[:, None])
        weights = weights / tl.maximum(tl.sum(weights, 1), 1e-30)[:, None]
    elif RENORM:
        weights = weights / (tl.sum(weights, 1)[:, None] + 1e-20)
    return weights * SCALE, ids


@triton.jit
def _route_block(
    block, logits, bias, token_slots, expert_map, num_tokens, out_weights, out_places, T,
    M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, SCORE: tl.constexpr,
    RENORM: tl.constexpr, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, G: tl.constexpr, TOP_G: tl.constexpr,
    TOP2: tl.constexpr, HAS_ADAPTERS: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    """Choose and reroute one block of BT tokens; write their weights and places."""
    t = block * BT + tl.arange(0, BT)
    in_batch = t < T
    weights, ids = _choose(logits, bias, t, in_batch, M, MP, K, KP, SCORE, RENORM, SCALE, HAS_BIAS, G, TOP_G, TOP2)
    kk = tl.arange(0, KP)
    wanted = in_batch[:, None] & (kk < K)[None, :]
    if HAS_ADAPTERS:
        adapter = tl.load(token_slots + t, mask=in_batch, other=0)
        places = tl.load(expert_map + adapter[:, None] * M + ids, mask=wanted, other=0)
    else:
        places = ids
    if HAS_PADDING:
        places = tl.where((t < tl.load(num_tokens))[:, None], places, -1)
    pair = t[:, None] * K + kk[None, :]
    tl.store(out_weights + pair, weights, mask=wanted)
    tl.store(out_places + pair, places, mask=wanted)


@triton.jit
def _order_block(block, places, pairs, tiles, num_tiles, P, TILE: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr):
    """Find the positions of BP pairs by counting, write them there, and open a tile at every TILE-th of a place."""
    p = block * BP + tl.arange(0, BP)
    mine = tl.load(places + p, mask=p < P, other=-1, cache_modifier=".cg")
    # counts by lane, summed once at the end: a reduction costs more than all the comparisons of a block
    ahead = tl.zeros((BP, BQ), tl.int32)  # smaller places below, the same one's earlier pairs above the 16th bit
    equals = tl.zeros((BP, BQ), tl.int32)
    for first in range(0, P, BQ):
        q = first + tl.arange(0, BQ)
        other = tl.load(places + q, mask=q < P, other=-1, cache_modifier=".cg")
        real = (other >= 0)[None, :]
        equal = (other[None, :] == mine[:, None]) & real
        smaller = (other[None, :] < mine[:, None]) & real
        ahead += smaller.to(tl.int32) + ((equal & (q[None, :] < p[:, None])).to(tl.int32) << 16)
        equals += equal.to(tl.int32)
    counted = tl.sum(ahead, 1)
    before = counted >> 16
    same = tl.sum(equals, 1)
    real = mine >= 0
    position = (counted & 0xFFFF) + before
    tl.store(pairs + position, p, mask=real)
    opens = real & (before % TILE == 0)
    tile = tl.atomic_add(num_tiles + tl.zeros((BP,), tl.int32), 1, mask=opens, sem="relaxed")
    tl.store(tiles + tile * 3, mine, mask=opens)
    tl.store(tiles + tile * 3 + 1, position, mask=opens)
    tl.store(tiles + tile * 3 + 2, tl.minimum(same - before, TILE), mask=opens)


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    logits, bias, token_slots, expert_map, num_tokens, out_weights, out_places, pairs, tiles, num_tiles, counters, T,
    M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, SCORE: tl.constexpr,
    RENORM: tl.constexpr, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, G: tl.constexpr, TOP_G: tl.constexpr,
    TOP2: tl.constexpr, HAS_ADAPTERS: tl.constexpr, HAS_PADDING: tl.constexpr, TILE: tl.constexpr, BP: tl.constexpr,
    BQ: tl.constexpr,
):  # fmt: skip
    """The single launch. counters: [ticket, arrivals], zero on entry, left zero by the last piece of work."""
    token_blocks = tl.cdiv(T, BT)
    pair_blocks = tl.cdiv(T * K, BP)
    work = tl.atomic_add(counters, 1, sem="relaxed")
    while work < token_blocks + pair_blocks:
        if work < token_blocks:
            if work == 0:
                tl.store(num_tiles, 0)  # released to the others by this block's arrival
            _route_block(work, logits, bias, token_slots, expert_map, num_tokens, out_weights, out_places, T, M, MP, K,
                         KP, BT, SCORE, RENORM, SCALE, HAS_BIAS, G, TOP_G, TOP2, HAS_ADAPTERS, HAS_PADDING)  # fmt: skip
            tl.debug_barrier()  # all threads' stores before the one thread's release
            tl.atomic_add(counters + 1, 1, sem="release", scope="gpu")
        else:
            while tl.atomic_add(counters + 1, 0, sem="acquire", scope="gpu") < token_blocks:
                pass
            tl.debug_barrier()
            _order_block(work - token_blocks, out_places, pairs, tiles, num_tiles, T * K, TILE, BP, BQ)
        work = tl.atomic_add(counters, 1, sem="relaxed")
    # every program takes exactly one ticket beyond the work; who takes the last of those is the last to leave
    if work == token_blocks + pair_blocks + tl.num_programs(0) - 1:
        tl.store(counters, 0)
        tl.store(counters + 1, 0)


@triton.jit(do_not_specialize=["T", "V"])
def count_kernel(
    logits, bias, token_slots, expert_map, num_tokens, out_weights, out_places, within, counts, T, V,
    M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, SCORE: tl.constexpr,
    RENORM: tl.constexpr, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, G: tl.constexpr, TOP_G: tl.constexpr,
    TOP2: tl.constexpr, HAS_ADAPTERS: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    """Counting sort, first launch: choose, and count this block's pairs by place. counts [blocks, V], zero on entry."""
    block = tl.program_id(0)
    _route_block(block, logits, bias, token_slots, expert_map, num_tokens, out_weights, out_places, T, M, MP, K, KP, BT,
                 SCORE, RENORM, SCALE, HAS_BIAS, G, TOP_G, TOP2, HAS_ADAPTERS, HAS_PADDING)  # fmt: skip
    tl.debug_barrier()  # the places are read back below in another layout
    i = tl.arange(0, BT * KP)
    first = block * BT * K
    p = first + i
    valid = (i < BT * K) & (p < T * K)
    mine = tl.load(out_places + p, mask=valid, other=-1, cache_modifier=".cg")
    before = tl.zeros((BT * KP,), tl.int32)
    same = tl.zeros((BT * KP,), tl.int32)
    for start in range(0, BT * KP, 32):
        j = start + tl.arange(0, 32)
        other = tl.load(out_places + first + j, mask=(j < BT * K) & (first + j < T * K), other=-1, cache_modifier=".cg")
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
    places, within, counts, starts, first_tiles, pairs, tiles, T, V, LAST_BLOCK,
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
    tl.store(pairs + position, p, mask=real)
    opens = real & (rank % TILE == 0)
    size = tl.load(counts + LAST_BLOCK * V + mine, mask=opens, other=0)
    tile = tl.load(first_tiles + mine, mask=opens, other=0) + rank // TILE
    tl.store(tiles + tile * 3, mine, mask=opens)
    tl.store(tiles + tile * 3 + 1, position, mask=opens)
    tl.store(tiles + tile * 3 + 2, tl.minimum(size - rank, TILE), mask=opens)


@torch.library.custom_op("heddle::expert_route", mutates_args=("counters",))
def _expert_route(
    logits: Tensor, expert_map: Tensor, token_slots: Tensor | None, bias: Tensor | None, num_tokens: Tensor | None,
    counters: Tensor, num_places: int, tile_rows: int, top_k: int, score: int, renormalise: bool, scale: float,
    num_groups: int, top_groups: int, group_score: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _empty_outputs(logits, top_k, num_places, tile_rows)
    weights, places, pairs, tiles, num_tiles = outputs
    tokens, experts = logits.shape
    assert tokens > 0
    rule = dict(
        M=experts, MP=triton.next_power_of_2(experts), K=top_k, KP=triton.next_power_of_2(top_k), SCORE=score,
        RENORM=renormalise, SCALE=scale, HAS_BIAS=bias is not None, G=num_groups, TOP_G=top_groups,
        TOP2=group_score == GroupScore.TOP2_SUM, HAS_ADAPTERS=token_slots is not None,
        HAS_PADDING=num_tokens is not None,
    )  # fmt: skip
    # an argument that is not read still needs a pointer
    inputs = (logits, logits if bias is None else bias, places if token_slots is None else token_slots, expert_map,
              places if num_tokens is None else num_tokens, weights, places)  # fmt: skip
    num_pairs = tokens * top_k
    if num_pairs <= _QUADRATIC:
        block_tokens = _decode_tokens(experts)
        work = triton.cdiv(tokens, block_tokens) + triton.cdiv(num_pairs, _BLOCK_PAIRS)
        route_kernel[(min(work, 128),)](*inputs, pairs, tiles, num_tiles, counters, tokens, **rule, BT=block_tokens,
                                        TILE=tile_rows, BP=_BLOCK_PAIRS, BQ=_BLOCK_OTHERS, num_warps=4)  # fmt: skip
    else:
        block_tokens = _count_tokens(experts)
        blocks = triton.cdiv(tokens, block_tokens)
        within = torch.empty_like(pairs)
        counts = torch.zeros(blocks + 1, num_places, dtype=torch.int32, device=logits.device)
        starts, first_tiles = torch.empty(2, num_places, dtype=torch.int32, device=logits.device)
        count_kernel[(blocks,)](*inputs, within, counts, tokens, num_places, **rule, BT=block_tokens, num_warps=8)
        scan_kernel[(triton.cdiv(num_places, _SCAN["BV"]),)](counts, starts, first_tiles, num_tiles, counters,
                                                            blocks + 1, num_places, TILE=tile_rows, **_SCAN,
                                                            num_warps=4)  # fmt: skip
        scatter_kernel[(triton.cdiv(num_pairs, 256),)](places, within, counts, starts, first_tiles, pairs, tiles,
                                                      tokens, num_places, blocks, K=top_k, BT=block_tokens, BP=256,
                                                      TILE=tile_rows, num_warps=4)  # fmt: skip
    return outputs


@_expert_route.register_fake
def _(
    logits: Tensor, expert_map: Tensor, token_slots: Tensor | None, bias: Tensor | None, num_tokens: Tensor | None,
    counters: Tensor, num_places: int, tile_rows: int, top_k: int, score: int, renormalise: bool, scale: float,
    num_groups: int, top_groups: int, group_score: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_outputs(logits, top_k, num_places, tile_rows)


def _empty_outputs(
    logits: Tensor, top_k: int, num_places: int, tile_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = logits.shape[0]

    def ints(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=logits.device)

    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    most = max_tiles(tokens * top_k, num_places, tile_rows)
    return weights, ints(tokens, top_k), ints(tokens * top_k), ints(most, 3), ints(1)


def expert_route(
    logits: Tensor,
    routing: Routing,
    expert_map: Tensor,
    num_places: int,
    batch: TokenBatch,
    tile_rows: int,
    bias: Tensor | None = None,
) -> Routed:
    """As in reference.py. The number of places bounds that of tiles."""
    assert batch.counters is not None
    outputs = _expert_route(
        logits.contiguous(), expert_map, batch.slots, bias, batch.num_tokens, batch.counters,
        num_places, tile_rows, routing.top_k, int(routing.score),
        routing.renormalise, routing.scale, routing.num_groups, routing.top_groups, int(routing.group_score),
    )  # fmt: skip
    return Routed(*outputs, tile_rows)


def configurations() -> Iterator[Configuration]:
    """DeepSeek-V2-Lite, DeepSeek-V3, Qwen3-30B-A3B, gpt-oss-120b: decode, and for the first the counting sort."""
    pointers = dict(logits="*fp32", bias="*fp32", token_slots="*i32", expert_map="*i32", num_tokens="*i32",
                    out_weights="*fp32", out_places="*i32")  # fmt: skip
    rest = dict(pairs="*i32", tiles="*i32", num_tiles="*i32", counters="*i32", T="i32")
    shapes = {
        "v2-lite": dict(M=64, K=6, SCORE=0, RENORM=False, SCALE=1.0, HAS_BIAS=False, G=1, TOP_G=1, TOP2=False),
        "v3": dict(M=256, K=8, SCORE=1, RENORM=True, SCALE=2.5, HAS_BIAS=True, G=8, TOP_G=4, TOP2=True),
        "qwen3": dict(M=128, K=8, SCORE=0, RENORM=True, SCALE=1.0, HAS_BIAS=False, G=1, TOP_G=1, TOP2=False),
        "gpt-oss": dict(M=128, K=4, SCORE=2, RENORM=False, SCALE=1.0, HAS_BIAS=False, G=1, TOP_G=1, TOP2=False),
    }
    batch = dict(HAS_ADAPTERS=True, HAS_PADDING=True)
    for name, shape in shapes.items():
        padded = dict(MP=triton.next_power_of_2(shape["M"]), KP=triton.next_power_of_2(shape["K"]))
        for tile in (16, 64):
            constants = {
                **shape,
                **padded,
                **batch,
                "BT": _decode_tokens(shape["M"]),
                "TILE": tile,
                "BP": _BLOCK_PAIRS,
                "BQ": _BLOCK_OTHERS,
            }
            yield Configuration(
                f"{name} decode tile {tile}", route_kernel, {**pointers, **rest}, constants, ("logits",)
            )
        constants = {**shape, **padded, **batch, "BT": _count_tokens(shape["M"])}
        types = {**pointers, "within": "*i32", "counts": "*i32", "T": "i32", "V": "i32"}
        yield Configuration(f"{name} count", count_kernel, types, constants, ("logits",), num_warps=8)
    types = dict(
        counts="*i32", starts="*i32", first_tiles="*i32", num_tiles="*i32", counters="*i32", BLOCKS="i32", V="i32"
    )
    yield Configuration("scan", scan_kernel, types, dict(TILE=64, **_SCAN))
    types = dict(places="*i32", within="*i32", counts="*i32", starts="*i32", first_tiles="*i32", pairs="*i32",
                 tiles="*i32", T="i32", V="i32", LAST_BLOCK="i32")  # fmt: skip
    yield Configuration("scatter", scatter_kernel, types, dict(K=6, BT=16, BP=256, TILE=64))
