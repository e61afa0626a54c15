"""Triton form of the choice: a block of tokens with all their scores in registers, used by both ways to sort.

Names of constants: M experts, padded to MP; K choices, padded to KP; BT tokens of a block; G groups, of which TOP_G
take part, ranked by the sum of their two best if TOP2. The others say which rule of Routing holds, and which tensors
exist.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kernels.expert_route.routing import GroupScore, Routing, Score

_SOFTMAX, _SIGMOID = tl.constexpr(int(Score.SOFTMAX)), tl.constexpr(int(Score.SIGMOID))
_SOFTMAX_OF_CHOSEN = tl.constexpr(int(Score.SOFTMAX_OF_CHOSEN))


class Tokens(NamedTuple):
    """What is known of a step's tokens, as in reference.py. In a kernel, pointers; so is the next."""

    logits: Any  # [T, M]
    bias: Any  # [M]; read if HAS_BIAS
    slots: Any  # [T] int32; read if HAS_ADAPTERS
    expert_map: Any  # [adapters + 1, M] int32; likewise
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
    experts: int, top_k: int, score: int, renormalise: bool, scale: float, num_groups: int, top_groups: int,
    group_score: int, has_bias: bool, has_adapters: bool, has_padding: bool,
) -> dict[str, int | float]:  # fmt: skip
    """The constants of a router's kernels: how many experts, the `numbers` of its Routing, and which tensors exist."""
    return dict(
        M=experts, MP=triton.next_power_of_2(experts), K=top_k, KP=triton.next_power_of_2(top_k), SCORE=score,
        RENORM=renormalise, SCALE=scale, HAS_BIAS=has_bias, G=num_groups, TOP_G=top_groups,
        TOP2=group_score == GroupScore.TOP2_SUM, HAS_ADAPTERS=has_adapters, HAS_PADDING=has_padding,
    )  # fmt: skip


@triton.jit
def _choose(
    logits, bias, t, in_batch,
    M: tl.constexpr, MP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SCORE: tl.constexpr, RENORM: tl.constexpr,
    SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, G: tl.constexpr, TOP_G: tl.constexpr, TOP2: tl.constexpr,
):  # fmt: skip
    """Weights and expert ids [BT, KP] of tokens t [BT]; M experts padded to MP, K choices padded to KP.

    The constants are those of `rule`. The best experts are taken one after another, each the first of the largest.
    """
    e = tl.arange(0, MP)
    kk = tl.arange(0, KP)
    none = float("-inf")
    x = tl.load(logits + t[:, None] * M + e[None, :], mask=in_batch[:, None] & (e < M)[None, :], other=none)
    x = x.to(tl.float32)
    x = tl.where((x == x) & in_batch[:, None], x, none)  # a NaN compares with nothing, and could choose the padding
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
    TOP2: tl.constexpr, HAS_ADAPTERS: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    """Choose and reroute one block of BT tokens, of T in all; write their weights and places.

    HAS_ADAPTERS: some token has an adapter of experts. HAS_PADDING: tokens from num_tokens on only pad the batch.
    """
    t = block * BT + tl.arange(0, BT)
    in_batch = t < T
    weights, ids = _choose(
        tokens.logits, tokens.bias, t, in_batch, M, MP, K, KP, SCORE, RENORM, SCALE, HAS_BIAS, G, TOP_G, TOP2
    )
    kk = tl.arange(0, KP)
    wanted = in_batch[:, None] & (kk < K)[None, :]
    if HAS_ADAPTERS:
        adapter = tl.load(tokens.slots + t, mask=in_batch, other=0)
        places = tl.load(tokens.expert_map + adapter[:, None] * M + ids, mask=wanted, other=0)
    else:
        places = ids
    if HAS_PADDING:
        places = tl.where((t < tl.load(tokens.num_tokens))[:, None], places, -1)
    pair = t[:, None] * K + kk[None, :]
    tl.store(chosen.weights + pair, weights, mask=wanted)
    tl.store(chosen.places + pair, places, mask=wanted)
