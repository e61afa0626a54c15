"""Triton form of the choice: a block of tokens with all their scores in registers, used by both ways to sort.

Names of constants: M experts, padded to MP; K choices, padded to KP, the last SHARED of which every token takes, with
ONLY_OWN as in Shared; MAP columns of the expert map; BT tokens of a block; G groups, of which TOP_G take part, ranked
by the sum of their two best if TOP2; PLANES that logits are the sum of, 0 if they are given. The others say which rule
of Routing holds, and which tensors exist.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.expert_route.routing import GroupScore, Routing, Score

_SOFTMAX, _SIGMOID = tl.constexpr(int(Score.SOFTMAX)), tl.constexpr(int(Score.SIGMOID))
_SOFTMAX_OF_CHOSEN = tl.constexpr(int(Score.SOFTMAX_OF_CHOSEN))


class Tokens(NamedTuple):
    """What is known of a step's tokens, as in reference.py. In a kernel, pointers; so is the next."""

    logits: Any  # [T, M], or [PLANES, T, M] float32
    router_bias: Any  # [M]; read if HAS_ROUTER_BIAS
    bias: Any  # [M]; read if HAS_BIAS
    slots: Any  # [T] int32; read if HAS_ADAPTERS
    expert_map: Any  # [adapters + 1, MAP] int32; likewise
    num_tokens: Any  # [1] int32; read if HAS_PADDING


class Chosen(NamedTuple):
    """What is written of each token, as in Routed."""

    weights: Any  # [T, K] float32
    places: Any  # [T, K] int32


def numbers(routing: Routing) -> tuple[int, int, bool, float, int, int, int]:
    """A Routing as an op of torch's library takes it."""
    return (routing.top_k, int(routing.score), routing.renormalise, routing.scale, routing.num_groups,
            routing.top_groups, int(routing.group_score))  # fmt: skip


def rule(
    experts: int, map_width: int, shared: int, only_own: bool, top_k: int, score: int, renormalise: bool, scale: float,
    num_groups: int, top_groups: int, group_score: int, has_bias: bool, has_adapters: bool, has_padding: bool,
) -> dict[str, int | float]:  # fmt: skip
    """The constants of a router's kernels: how many experts, the `numbers` of its Routing, and which tensors exist."""
    choices = top_k + shared
    return dict(
        M=experts, MP=triton.next_power_of_2(experts), K=choices, KP=triton.next_power_of_2(choices), SCORE=score,
        RENORM=renormalise, SCALE=scale, HAS_BIAS=has_bias, G=num_groups, TOP_G=top_groups,
        TOP2=group_score == GroupScore.TOP2_SUM, HAS_ADAPTERS=has_adapters, HAS_PADDING=has_padding, MAP=map_width,
        SHARED=shared, ONLY_OWN=only_own,
    )  # fmt: skip


@triton.jit
def _logits(
    tokens, t, e, known, T, M: tl.constexpr, PLANES: tl.constexpr, HAS_ROUTER_BIAS: tl.constexpr
):  # fmt: skip
    """[BT, MP] float32, of tokens t and experts e where known; the planes are added up in their order."""
    if PLANES == 0:
        x = tl.load(tokens.logits + t[:, None] * M + e[None, :], mask=known, other=0.0).to(tl.float32)
    else:  # written by others in this launch
        at = tokens.logits + t[:, None] * M + e[None, :]
        x = tl.load(at, mask=known, other=0.0, cache_modifier=".cg")
        for plane in tl.static_range(1, PLANES):
            x += tl.load(at + plane * T * M, mask=known, other=0.0, cache_modifier=".cg")
    if HAS_ROUTER_BIAS:
        x += tl.load(tokens.router_bias + e, mask=e < M, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _choose(
    tokens, t, in_batch, T,
    M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SCORE: tl.constexpr, RENORM: tl.constexpr,
    SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, G: tl.constexpr, TOP_G: tl.constexpr, TOP2: tl.constexpr,
    PLANES: tl.constexpr, HAS_ROUTER_BIAS: tl.constexpr,
):  # fmt: skip
    """Weights and expert ids [BT, KP] of tokens t [BT]; M experts padded to MP, K choices padded to KP.

    The constants are those of `rule`, and K does not count shared experts. The best experts are taken one after
    another, each the first of the largest.
    """
    e = tl.arange(0, MP)
    kk = tl.arange(0, KP)
    none = float("-inf")
    known = in_batch[:, None] & (e < M)[None, :]
    x = _logits(tokens, t, e, known, T, M, PLANES, HAS_ROUTER_BIAS)
    x = tl.where((x == x) & known, x, none)  # a NaN compares with nothing, and could choose the padding
    x = tl.minimum(x, 1e30)
    if SCORE == _SOFTMAX:
        p = tl.exp(x - tl.maximum(tl.max(x, 1), -1e30)[:, None])
        scores = p / tl.maximum(tl.sum(p, 1), 1e-30)[:, None]
    elif SCORE == _SIGMOID:
        scores = tl.sigmoid(x)
    else:
        scores = x
    ranked = scores
    if HAS_BIAS:
        ranked = ranked + tl.load(tokens.bias + e, mask=e < M, other=0.0).to(tl.float32)[None, :]
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
    weights = tl.full((t.shape[0], KP), none if SCORE == _SOFTMAX_OF_CHOSEN else 0.0, tl.float32)
    ids = tl.zeros((t.shape[0], KP), tl.int32)
    for j in tl.static_range(K):
        _, at = tl.max(ranked, 1, return_indices=True, return_indices_tie_break_left=True)
        at = tl.minimum(at, M - 1)  # nothing is left where every score is infinite; stay inside the expert map
        chosen = e[None, :] == at[:, None]
        weight = tl.sum(tl.where(chosen, scores, 0.0), 1)
        weights = tl.where((kk == j)[None, :], weight[:, None], weights)
        ids = tl.where((kk == j)[None, :], at[:, None].to(tl.int32), ids)
        ranked = tl.where(chosen, none, ranked)
    if SCORE == _SOFTMAX_OF_CHOSEN:
        weights = tl.exp(weights - tl.maximum(tl.max(weights, 1), -1e30)[:, None])
        weights = weights / tl.maximum(tl.sum(weights, 1), 1e-30)[:, None]
    elif RENORM:
        weights = weights / (tl.sum(weights, 1)[:, None] + 1e-20)
    return weights * SCALE, ids


@triton.jit
def choose_block(
    block, tokens, chosen, T,
    M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, SCORE: tl.constexpr,
    RENORM: tl.constexpr, SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, G: tl.constexpr, TOP_G: tl.constexpr,
    TOP2: tl.constexpr, HAS_ADAPTERS: tl.constexpr, HAS_PADDING: tl.constexpr, MAP: tl.constexpr,
    SHARED: tl.constexpr, ONLY_OWN: tl.constexpr, PLANES: tl.constexpr = 0, HAS_ROUTER_BIAS: tl.constexpr = False,
):  # fmt: skip
    """Choose and reroute one block of BT tokens, of T in all; write their weights and places.

    HAS_ADAPTERS: some token has an adapter of experts. HAS_PADDING: tokens from num_tokens on only pad the batch.
    """
    t = block * BT + tl.arange(0, BT)
    in_batch = t < T
    weights, ids = _choose(
        tokens, t, in_batch, T, M, MP, K - SHARED, KP, SCORE, RENORM, SCALE, HAS_BIAS, G, TOP_G, TOP2, PLANES,
        HAS_ROUTER_BIAS,
    )  # fmt: skip
    kk = tl.arange(0, KP)
    if SHARED > 0:
        is_shared = (kk >= K - SHARED)[None, :]
        weights = tl.where(is_shared, 1.0, weights)
        ids = tl.where(is_shared, (M + kk - (K - SHARED))[None, :], ids)
    wanted = in_batch[:, None] & (kk < K)[None, :]
    if HAS_ADAPTERS:
        adapter = tl.load(tokens.slots + t, mask=in_batch, other=0)
        places = tl.load(tokens.expert_map + adapter[:, None] * MAP + ids, mask=wanted, other=0)
    else:
        places = ids
    if ONLY_OWN:
        places = tl.where((kk >= K - SHARED)[None, :] & (places < M + SHARED), -1, places)
    if HAS_PADDING:
        places = tl.where((t < tl.load(tokens.num_tokens))[:, None], places, -1)
    pair = t[:, None] * K + kk[None, :]
    tl.store(chosen.weights + pair, weights, mask=wanted)
    tl.store(chosen.places + pair, places, mask=wanted)
