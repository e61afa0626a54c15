"""Triton form of expert_route, for few tokens in one launch and for many in three (counting_sort/).

Few tokens: programs take pieces of work by ticket. Blocks of tokens come first (scores, top-k, reroute: choice/), then
blocks of pairs (their positions and tiles). A pair's position is counted, not sorted. That is quadratic in the pairs
and still the cheapest for a few thousand. It needs no histogram over places and no padding, and its order does not
depend on timing.

A program that holds a block of pairs waits until all blocks of tokens are done. Their tickets were taken before its
own, by programs that are running and do not wait while they work on such a block. So there is no deadlock, however few
programs run at once.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration, Tiles
from kernels.expert_route.choice.kernel import Chosen, Tokens, choose_block, numbers, rule
from kernels.expert_route.counting_sort import kernel as counting_sort
from kernels.expert_route.routing import GroupScore, Routed, Routing, Score, TokenBatch, max_tiles

_PAIRS = dict(BP=32, BQ=64)  # pairs put in order by one piece of work; pairs that it compares them with at a time
_QUADRATIC = 4096  # pairs up to which counting is cheaper than the counting sort's launches; counts fit into 16 bits


def _decode_tokens(experts: int) -> int:
    """Tokens of one piece of work: as many scores as the registers of four warps hold."""
    return max(1, min(4, 512 // triton.next_power_of_2(experts)))


@triton.jit
def _order_block(block, places, tiles, P, TILE: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr):
    """Find the positions of BP of the P pairs, write them there, and open a tile at every TILE-th pair of a place.

    A pair's position: how many pairs have a smaller place, plus how many before it have the same.
    """
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
    tl.store(tiles.pairs + position, p, mask=real)
    opens = real & (before % TILE == 0)
    tile = tl.atomic_add(tiles.num_tiles + tl.zeros((BP,), tl.int32), 1, mask=opens, sem="relaxed")
    tl.store(tiles.tiles + tile * 3, mine, mask=opens)
    tl.store(tiles.tiles + tile * 3 + 1, position, mask=opens)
    tl.store(tiles.tiles + tile * 3 + 2, tl.minimum(same - before, TILE), mask=opens)


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    tokens, chosen, tiles, counters, T,
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
                tl.store(tiles.num_tiles, 0)  # released to the others by this block's arrival
            choose_block(work, tokens, chosen, T, M, MP, K, KP, BT, SCORE, RENORM, SCALE, HAS_BIAS, G, TOP_G, TOP2,
                         HAS_ADAPTERS, HAS_PADDING)  # fmt: skip
            tl.debug_barrier()  # all threads' stores before the one thread's release
            tl.atomic_add(counters + 1, 1, sem="release", scope="gpu")
        else:
            while tl.atomic_add(counters + 1, 0, sem="acquire", scope="gpu") < token_blocks:
                pass
            tl.debug_barrier()
            _order_block(work - token_blocks, chosen.places, tiles, T * K, TILE, BP, BQ)
        work = tl.atomic_add(counters, 1, sem="relaxed")
    # every program takes exactly one ticket beyond the work; who takes the last of those is the last to leave
    if work == token_blocks + pair_blocks + tl.num_programs(0) - 1:
        tl.store(counters, 0)
        tl.store(counters + 1, 0)


@torch.library.custom_op("heddle::expert_route", mutates_args=("counters",))
def _expert_route(
    logits: Tensor, expert_map: Tensor, token_slots: Tensor | None, bias: Tensor | None, num_tokens: Tensor | None,
    counters: Tensor, num_places: int, tile_rows: int, top_k: int, score: int, renormalise: bool, scale: float,
    num_groups: int, top_groups: int, group_score: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _empty_outputs(logits, top_k, num_places, tile_rows)
    weights, places, pairs, tiles, num_tiles = outputs
    count, experts = logits.shape
    assert count > 0
    constants = rule(experts, top_k, score, renormalise, scale, num_groups, top_groups, group_score, bias is not None,
                     token_slots is not None, num_tokens is not None)  # fmt: skip
    # an argument that is not read still needs a pointer
    tokens = Tokens(logits, logits if bias is None else bias, places if token_slots is None else token_slots,
                    expert_map, places if num_tokens is None else num_tokens)  # fmt: skip
    chosen, order = Chosen(weights, places), Tiles(tiles, num_tiles, pairs)
    if len(pairs) > _QUADRATIC:
        counting_sort.route_and_sort(tokens, chosen, order, counters, constants, num_places, tile_rows)
        return outputs
    block_tokens = _decode_tokens(experts)
    work = triton.cdiv(count, block_tokens) + triton.cdiv(len(pairs), _PAIRS["BP"])
    route_kernel[(min(work, 128),)](
        tokens, chosen, order, counters, count, **constants, BT=block_tokens, TILE=tile_rows, **_PAIRS
    )
    return outputs


@_expert_route.register_fake
def _(
    logits: Tensor, expert_map: Tensor, token_slots: Tensor | None, bias: Tensor | None, num_tokens: Tensor | None,
    counters: Tensor, num_places: int, tile_rows: int, top_k: int, *_: object,
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
        num_places, tile_rows, *numbers(routing),
    )  # fmt: skip
    return Routed(*outputs, tile_rows)


def configurations() -> Iterator[Configuration]:
    """DeepSeek-V2-Lite, DeepSeek-V3, Qwen3-30B-A3B, gpt-oss-120b, for few tokens and for many."""
    routers = {
        "v2-lite": (64, Routing(6), False),
        "v3": (256, Routing(8, Score.SIGMOID, True, 2.5, 8, 4, GroupScore.TOP2_SUM), True),
        "qwen3": (128, Routing(8, renormalise=True), False),
        "gpt-oss": (128, Routing(4, Score.SOFTMAX_OF_CHOSEN), False),
    }
    rules = {
        name: rule(experts, *numbers(routing), has_bias, has_adapters=True, has_padding=True)
        for name, (experts, routing, has_bias) in routers.items()
    }
    types = {"tokens": Tokens("*fp32:16", "*fp32:16", "*i32:16", "*i32:16", "*i32:16"),
             "chosen": Chosen("*fp32:16", "*i32:16")}  # fmt: skip
    tiles = {"tiles": Tiles("*i32:16", "*i32:16", "*i32:16"), "counters": "*i32:16", "T": "i32"}
    for name, constants in rules.items():
        for tile in (16, 64):
            its = {**constants, "BT": _decode_tokens(int(constants["M"])), "TILE": tile, **_PAIRS}
            yield Configuration(f"{name} decode tile {tile}", route_kernel, {**types, **tiles}, its)
    yield from counting_sort.configurations(types, rules)
