"""Triton form of expert_route, for few tokens in one launch and for many in three (counting_sort/).

Few tokens: programs take pieces of work by ticket. Pieces of the router's product come first, where logits are not
given (product/), then blocks of tokens (scores, top-k, reroute: choice/), then blocks of pairs (their positions and
tiles). A pair's position is counted, not sorted. That is quadratic in the pairs
and still the cheapest for a few thousand. It needs no histogram over places and no padding, and its order does not
depend on timing.

A program that holds a block of tokens waits until the product is there, one that holds a block of pairs until all
blocks of tokens are done. Tickets of what is waited for were taken before its own, by programs that are running and
wait for nobody behind them. So there is no deadlock, however few programs run at once. All arrivals are counted
together: who waits for the later kind knows how many there are of both.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.compiled.kernel import Configuration, Tiles
from kernels.compiled.launch import launch
from kernels.expert_route.choice.kernel import Chosen, Tokens, choose_block, numbers, rule
from kernels.expert_route.counting_sort import kernel as counting_sort
from kernels.expert_route.product.kernel import Factors, cut, multiply_piece, num_pieces
from kernels.expert_route.routing import (
    GroupScore,
    Routed,
    RouterLinear,
    Routing,
    Score,
    Shared,
    TokenBatch,
    max_tiles,
)

_PAIRS = dict(BP=32, BQ=64)  # pairs put in order by one piece of work; pairs that it compares them with at a time
_QUADRATIC = 4096  # pairs up to which counting is cheaper than the counting sort's launches; counts fit into 16 bits


# the product's constants where logits are given
_GIVEN = dict(H=1, PT=16, PM=16, PD=16, DEPTH=16, PLANES=0, AS_X=False, HAS_ROUTER_BIAS=False)


def are_few(pairs: int) -> bool:
    """Whether so many pairs are chosen and sorted in one launch."""
    return pairs <= _QUADRATIC


def _decode_tokens(experts: int) -> int:
    """Tokens of one piece of work: as many scores as the registers of four warps hold."""
    return max(1, min(4, 512 // triton.next_power_of_2(experts)))


@triton.jit
def _order_block(block, places, tiles, P, TILE: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr):
    """Find the positions of BP of the P pairs, write them there, and open a tile at every TILE-th pair of a place.
    Behind the number of tiles stands that of pairs which have a place.

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
    tl.atomic_add(tiles.num_tiles + 1, tl.sum(real.to(tl.int32)), sem="relaxed")


@triton.jit
def _wait(arrivals, count):
    """Until so many have arrived, and what they wrote can be read."""
    while tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu") < count:
        pass
    tl.debug_barrier()


@triton.jit
def _arrive(arrivals):
    tl.debug_barrier()  # all threads' stores before the one thread's release
    tl.atomic_add(arrivals, 1, sem="release", scope="gpu")


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    factors, tokens, chosen, tiles, counters, T,
    M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, SCORE: tl.constexpr,
    RENORM: tl.constexpr, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, G: tl.constexpr, TOP_G: tl.constexpr,
    TOP2: tl.constexpr, HAS_ADAPTERS: tl.constexpr, HAS_PADDING: tl.constexpr, MAP: tl.constexpr,
    SHARED: tl.constexpr, ONLY_OWN: tl.constexpr, TILE: tl.constexpr, BP: tl.constexpr, BQ: tl.constexpr,
    H: tl.constexpr, PT: tl.constexpr, PM: tl.constexpr, PD: tl.constexpr, DEPTH: tl.constexpr, PLANES: tl.constexpr,
    AS_X: tl.constexpr, HAS_ROUTER_BIAS: tl.constexpr,
):  # fmt: skip
    """The single launch. counters: [ticket, arrivals], zero on entry, left zero by the last piece of work.

    PLANES > 0: logits are computed here, else factors are not read.
    """
    pieces = num_pieces(T, M, PT, PM, PLANES)
    chosen_by = pieces + tl.cdiv(T, BT)
    end = chosen_by + tl.cdiv(T * K, BP)
    work = tl.atomic_add(counters, 1, sem="relaxed")
    while work < end:
        if work == 0:
            tl.store(tiles.num_tiles, 0)  # released to the others by this piece's arrival
            tl.store(tiles.num_tiles + 1, 0)
        if work < pieces:
            if PLANES > 0:
                multiply_piece(work, factors, tokens.logits, T, M, H, PT, PM, PD, DEPTH, AS_X)
                _arrive(counters + 1)
        elif work < chosen_by:
            if PLANES > 0:
                _wait(counters + 1, pieces)
            choose_block(work - pieces, tokens, chosen, T, M, MP, K, KP, BT, SCORE, RENORM, SCALE, HAS_BIAS, G, TOP_G,
                         TOP2, HAS_ADAPTERS, HAS_PADDING, MAP, SHARED, ONLY_OWN, PLANES, HAS_ROUTER_BIAS)  # fmt: skip
            _arrive(counters + 1)
        else:
            _wait(counters + 1, chosen_by)
            _order_block(work - chosen_by, chosen.places, tiles, T * K, TILE, BP, BQ)
        work = tl.atomic_add(counters, 1, sem="relaxed")
    # every program takes exactly one ticket beyond the work; who takes the last of those is the last to leave
    if work == end + tl.num_programs(0) - 1:
        tl.store(counters, 0)
        tl.store(counters + 1, 0)


def _launch_few(
    factors: Factors, tokens: Tokens, chosen: Chosen, order: Tiles, counters: Tensor, constants: dict[str, Any],
    product: dict[str, int],
) -> None:  # fmt: skip
    count, pairs = chosen.weights.shape[0], len(order.pairs)
    block_tokens = _decode_tokens(constants["M"])
    its = product["PLANES"] * triton.cdiv(count, product["PT"]) * triton.cdiv(constants["M"], product["PM"])
    work = its + triton.cdiv(count, block_tokens) + triton.cdiv(pairs, _PAIRS["BP"])
    route_kernel[(min(work, 128),)](
        factors, tokens, chosen, order, counters, count, **constants, BT=block_tokens, **_PAIRS, **product
    )


@launch("expert_route", mutates_args=("counters",))
def _expert_route(
    logits: Tensor, expert_map: Tensor, token_slots: Tensor | None, bias: Tensor | None, num_tokens: Tensor | None,
    counters: Tensor, num_places: int, tile_rows: int, shared: int, only_own: bool, top_k: int, score: int,
    renormalise: bool, scale: float, num_groups: int, top_groups: int, group_score: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _empty_outputs(logits, top_k + shared, num_places, tile_rows)
    weights, places, pairs, tiles, counts = outputs
    count, experts = logits.shape
    assert count > 0
    constants = rule(experts, expert_map.shape[1], shared, only_own, top_k, score, renormalise, scale, num_groups,
                     top_groups, group_score, bias is not None, token_slots is not None,
                     num_tokens is not None)  # fmt: skip
    tokens = _tokens(logits, None, bias, token_slots, expert_map, num_tokens, places)
    chosen, order = Chosen(weights, places), Tiles(tiles, counts, pairs)
    if are_few(len(pairs)):
        _launch_few(Factors(logits, logits), tokens, chosen, order, counters, dict(constants, TILE=tile_rows), _GIVEN)
    else:
        counting_sort.route_and_sort(tokens, chosen, order, counters, constants, num_places, tile_rows)
    return outputs


@_expert_route.register_fake
def _(
    logits: Tensor, expert_map: Tensor, token_slots: Tensor | None, bias: Tensor | None, num_tokens: Tensor | None,
    counters: Tensor, num_places: int, tile_rows: int, shared: int, only_own: bool, top_k: int, *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_outputs(logits, top_k + shared, num_places, tile_rows)


@launch("expert_route_of", mutates_args=("counters",))
def _expert_route_of(
    x: Tensor, weight: Tensor, router_bias: Tensor | None, as_x: bool, expert_map: Tensor, token_slots: Tensor | None,
    bias: Tensor | None, num_tokens: Tensor | None, counters: Tensor, num_places: int, tile_rows: int, shared: int,
    only_own: bool, top_k: int, score: int, renormalise: bool, scale: float, num_groups: int, top_groups: int,
    group_score: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    outputs = _empty_outputs(x, top_k + shared, num_places, tile_rows)
    weights, places, pairs, tiles, counts = outputs
    (count, hidden), experts = x.shape, len(weight)
    assert count > 0 and x.is_contiguous() and weight.is_contiguous() and are_few(len(pairs))
    constants = rule(experts, expert_map.shape[1], shared, only_own, top_k, score, renormalise, scale, num_groups,
                     top_groups, group_score, bias is not None, token_slots is not None,
                     num_tokens is not None)  # fmt: skip
    product = cut(count, experts, hidden, x.itemsize if as_x else 4)
    logits = torch.empty(product["PLANES"], count, experts, dtype=torch.float32, device=x.device)
    tokens = _tokens(logits, router_bias, bias, token_slots, expert_map, num_tokens, places)
    _launch_few(Factors(x, weight), tokens, Chosen(weights, places), Tiles(tiles, counts, pairs), counters,
                dict(constants, TILE=tile_rows, AS_X=as_x, HAS_ROUTER_BIAS=router_bias is not None),
                product)  # fmt: skip
    return outputs


@_expert_route_of.register_fake
def _(
    x: Tensor, weight: Tensor, router_bias: Tensor | None, as_x: bool, expert_map: Tensor, token_slots: Tensor | None,
    bias: Tensor | None, num_tokens: Tensor | None, counters: Tensor, num_places: int, tile_rows: int, shared: int,
    only_own: bool, top_k: int, *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_outputs(x, top_k + shared, num_places, tile_rows)


def _tokens(
    logits: Tensor, router_bias: Tensor | None, bias: Tensor | None, token_slots: Tensor | None, expert_map: Tensor,
    num_tokens: Tensor | None, places: Tensor,
) -> Tokens:  # fmt: skip
    """An argument that is not read still needs a pointer."""
    return Tokens(logits, logits if router_bias is None else router_bias, logits if bias is None else bias,
                  places if token_slots is None else token_slots, expert_map,
                  places if num_tokens is None else num_tokens)  # fmt: skip


def _empty_outputs(
    like: Tensor, choices: int, num_places: int, tile_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens = like.shape[0]

    def ints(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=like.device)

    weights = torch.empty(tokens, choices, dtype=torch.float32, device=like.device)
    most = max_tiles(tokens * choices, num_places, tile_rows)
    return weights, ints(tokens, choices), ints(tokens * choices), ints(most, 3), ints(2)


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
    *outputs, counts = _expert_route(
        logits.contiguous(), expert_map, batch.slots, bias, batch.num_tokens, batch.counters,
        num_places, tile_rows, *batch.shared, *numbers(routing),
    )  # fmt: skip
    return Routed(*outputs, counts[:1], tile_rows, counts[1:])


def expert_route_of(
    x: Tensor,
    router: RouterLinear,
    routing: Routing,
    expert_map: Tensor,
    num_places: int,
    batch: TokenBatch,
    tile_rows: int,
    bias: Tensor | None = None,
) -> Routed:
    """As in reference.py, for few tokens."""
    assert batch.counters is not None
    *outputs, counts = _expert_route_of(
        x.contiguous(), router.weight, router.bias, router.as_x, expert_map, batch.slots, bias, batch.num_tokens,
        batch.counters, num_places, tile_rows, *batch.shared, *numbers(routing),
    )  # fmt: skip
    return Routed(*outputs, counts[:1], tile_rows, counts[1:])


def configurations() -> Iterator[Configuration]:
    """DeepSeek-V2-Lite, DeepSeek-V3, Qwen3-30B-A3B, gpt-oss-120b, for few tokens and for many; with the router's
    product for one token, for a batch and for a short prompt."""
    routers = {
        "v2-lite": (64, 2048, Shared(2), Routing(6), False),
        "v3": (256, 7168, Shared(1), Routing(8, Score.SIGMOID, True, 2.5, 8, 4, GroupScore.TOP2_SUM), True),
        "qwen3": (128, 2048, Shared(), Routing(8, renormalise=True), False),
        "gpt-oss": (128, 2880, Shared(), Routing(4, Score.SOFTMAX_OF_CHOSEN), False),
    }
    rules = {
        name: rule(experts, experts + shared.num, *shared, *numbers(routing), has_bias, has_adapters=True,
                   has_padding=True)
        for name, (experts, _, shared, routing, has_bias) in routers.items()
    }  # fmt: skip
    types = {"tokens": Tokens("*fp32:16", "*fp32:16", "*fp32:16", "*i32:16", "*i32:16", "*i32:16"),
             "chosen": Chosen("*fp32:16", "*i32:16")}  # fmt: skip
    tiles = {"tiles": Tiles("*i32:16", "*i32:16", "*i32:16"), "counters": "*i32:16", "T": "i32"}
    for name, constants in rules.items():
        experts, hidden, shared, _, _ = routers[name]
        its = {**constants, "BT": _decode_tokens(experts), **_PAIRS}
        for tile in (16, 64):
            given = {"factors": Factors("*fp32:16", "*fp32:16"), **types, **tiles}
            yield Configuration(f"{name} decode tile {tile}", route_kernel, given, {**its, "TILE": tile, **_GIVEN})
        for tokens, x, size in ((1, "*bf16:16", 2), (256, "*bf16:16", 2), (8, "*fp32:16", 4)):
            of = {"factors": Factors(x, "*fp32:16"), **types, **tiles}
            product = cut(tokens, experts, hidden, size) | dict(AS_X=True, HAS_ROUTER_BIAS=name == "gpt-oss", TILE=16)
            yield Configuration(f"{name} {tokens} {x[1:5]} tokens", route_kernel, of, {**its, **product})
        if shared.num:
            only_own = {**its, "TILE": 16, **_GIVEN, "ONLY_OWN": True}
            given = {"factors": Factors("*fp32:16", "*fp32:16"), **types, **tiles}
            yield Configuration(f"{name} own shared experts", route_kernel, given, only_own)
    yield from counting_sort.configurations(types, rules)
