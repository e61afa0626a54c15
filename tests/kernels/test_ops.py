"""Each op against the obvious computation, on odd shapes, with unwritten memory poisoned."""

import math
import random

import pytest
import torch
from torch import Tensor

from kernels.expert_route import Routing, TokenBatch, expert_route
from kernels.grouped_gemm import Activation, Layout, combine, down, gate_up
from kernels.lora import LoraSite, LoraWeights, Segment, Segments, lora
from kernels.paged_attention import AttentionBatch, paged_attention
from kernels.store_kv import store_kv

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ATOL = 2e-5  # float32 sums of up to a few hundred products of order 1
POPULARITIES = ("distinct", "uniform", "zipf", "identical", "skewed")


def pick(popularity: str, count: int, choices: int, rng: random.Random) -> list[int]:
    """`count` adapters out of 0..choices-1, as a batch may ask for them."""
    match popularity:
        case "distinct":
            return [index % choices for index in range(count)]
        case "uniform":
            return [rng.randrange(choices) for _ in range(count)]
        case "zipf":
            return rng.choices(range(choices), [1 / (1 + index) ** 1.5 for index in range(choices)], k=count)
        case "identical":
            return [choices - 1] * count
        case _:  # one takes nearly all
            return [0 if rng.random() < 0.95 else rng.randrange(choices) for _ in range(count)]


# -- attention ---


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence, one head and one query at a time. query [q, Hq, D]: the last q positions of key [n, Hkv, D]."""
    out = torch.zeros(*query.shape[:2], value.shape[-1])
    group = query.shape[1] // key.shape[1]
    for row in range(len(query)):
        position = len(key) - len(query) + row
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(query.shape[1]):
            scores = key[first : position + 1, head // group] @ query[row, head] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            total = weights.sum() + (0 if sinks is None else sinks[head].exp())
            out[row, head] = (weights / total) @ value[first : position + 1, head // group]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 3.0}, {"window": 1}, {"sinks": True},
                                     {"window": 7, "softcap": 2.0, "sinks": True}], ids=str)  # fmt: skip
def test_paged_attention(kv_heads: int, options: dict[str, object]) -> None:
    heads, dim, value_dim, block_size = 6, 9, 5, 4
    rng = random.Random(1)
    # prefill from nothing, a chunk in the middle, decodes of all lengths; more than one padded group of decodes
    shapes = [(7, 7), (3, 11), (1, 1), (1, 4), (1, 5), (1, 40), (12, 13)] + [
        (1, rng.randrange(1, 60)) for _ in range(30)
    ]
    free = list(range(1000))
    rng.shuffle(free)
    tables = [[free.pop() for _ in range(-(-kv_len // block_size))] for _, kv_len in shapes]
    key_cache = torch.randn(1000, block_size, kv_heads, dim) * 50  # other requests' keys: finite, and never to be seen
    value_cache = torch.randn(1000, block_size, kv_heads, value_dim) * 50
    keys = [torch.randn(kv_len, kv_heads, dim) for _, kv_len in shapes]
    values = [torch.randn(kv_len, kv_heads, value_dim) for _, kv_len in shapes]
    for table, key, value in zip(tables, keys, values, strict=True):
        slots = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(len(key))])
        store_kv(key, value, key_cache, value_cache, slots)
    queries = [torch.randn(query_len, heads, dim) for query_len, _ in shapes]
    sinks = torch.randn(heads) if options.get("sinks") else None
    window, softcap = options.get("window"), options.get("softcap")
    batch = AttentionBatch([q for q, _ in shapes], [kv for _, kv in shapes], tables, block_size, torch.float32)
    got = paged_attention(torch.cat(queries), key_cache, value_cache, batch, 0.3, window, softcap, sinks)  # type: ignore[arg-type]
    expected = [
        naive_attention(q, k, v, 0.3, window, softcap, sinks) for q, k, v in zip(queries, keys, values, strict=True)
    ]  # type: ignore[arg-type]
    torch.testing.assert_close(got, torch.cat(expected), atol=ATOL, rtol=0)


# -- experts ---

ONE_TILE = 1 << 30


def logits_for(chosen: Tensor, experts: int) -> Tensor:
    """Logits by which each token chooses these experts, the first of them first."""
    logits = torch.zeros(len(chosen), experts)
    logits.scatter_(1, chosen, torch.arange(chosen.shape[1], 0, -1).float().expand_as(chosen))
    return logits


def test_expert_route_on_the_papers_example() -> None:
    """ExpertWeave (arXiv 2508.17624), figure 4: M = 64, E_max = 8, adapters that tune 3 and 7 experts."""
    tuned = {1: [3, 14, 47], 2: [5, 13, 14, 27, 35, 57, 59]}
    expert_map = torch.arange(64, dtype=torch.int32).repeat(3, 1)
    for adapter, experts in tuned.items():
        expert_map[adapter, experts] = 64 + (adapter - 1) * 8 + torch.arange(len(experts), dtype=torch.int32)
    chosen = torch.tensor([[15, 14, 45, 47, 3, 57], [31, 13, 62, 12, 34, 14], [26, 47, 31, 3, 58, 60],
                           [13, 31, 14, 35, 15, 5], [8, 27, 35, 59, 5, 63], [57, 5, 3, 13, 27, 59]])  # fmt: skip
    adapters = torch.tensor([0, 1, 1, 2, 2, 2])
    expected = [[15, 14, 45, 47, 3, 57], [31, 13, 62, 12, 34, 65], [26, 66, 31, 64, 58, 60],
                [73, 31, 74, 76, 15, 72], [8, 75, 76, 78, 72, 63], [77, 72, 3, 73, 75, 78]]  # fmt: skip
    routed = expert_route(logits_for(chosen, 64), Routing(6), expert_map, 80, TokenBatch(adapters), ONE_TILE)
    assert routed.slots.tolist() == expected
    flat = routed.slots.flatten()
    assert flat[routed.pairs.long()].tolist() == sorted(flat.tolist())
    assert routed.tiles[:, 0].tolist() == sorted(set(flat.tolist())) and int(routed.tiles[:, 2].sum()) == 36


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 8, 12), (7, 5, 9), (64, 16, 8)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_experts(popularity: str, tokens: int, width: int, inner: int, transposed: bool, bias: bool) -> None:
    experts, choices, slots = 6, 3, 40
    rng = random.Random(2)
    expert_map = torch.arange(experts, dtype=torch.int32).repeat(4, 1)
    expert_map[1, [0, 4]] = torch.tensor([6, 7], dtype=torch.int32)
    expert_map[3, 2] = 33
    logits = torch.randn(tokens, experts)
    adapters = torch.tensor(pick(popularity, tokens, 4, rng))
    ups, downs = torch.randn(slots, 2 * inner, width), torch.randn(slots, width, inner)
    ids = logits.topk(choices).indices
    used = torch.unique(expert_map[adapters[:, None], ids])
    unused = [slot for slot in range(slots) if slot not in used]
    ups[unused] = downs[unused] = math.nan  # nobody may read an unused slot
    up_bias, down_bias = (torch.randn(slots, 2 * inner), torch.randn(slots, width)) if bias else (None, None)
    hidden = torch.randn(tokens, width)
    layout = Layout(transposed)
    stored = [stack.transpose(1, 2).contiguous() if transposed else stack for stack in (ups, downs)]
    routed = expert_route(logits, Routing(choices, renormalise=True), expert_map, slots, TokenBatch(adapters), ONE_TILE)
    gated = gate_up(hidden, stored[0], routed, Activation(), layout, up_bias)
    got = combine(down(gated, stored[1], routed, layout, down_bias), routed)
    weights = logits.softmax(-1).gather(1, ids)
    weights /= weights.sum(-1, keepdim=True)
    for token in range(tokens):
        expected = torch.zeros(width)
        for choice in range(choices):
            slot = expert_map[adapters[token], ids[token, choice]]
            gate, up = (ups[slot] @ hidden[token] + (0 if up_bias is None else up_bias[slot])).chunk(2)
            product = downs[slot] @ (torch.nn.functional.silu(gate) * up)
            expected += weights[token, choice] * (product + (0 if down_bias is None else down_bias[slot]))
        torch.testing.assert_close(got[token], expected, atol=10 * ATOL, rtol=1e-5)


def test_base_only_batches_are_not_rerouted() -> None:
    logits = logits_for(torch.tensor([[2, 0], [1, 2]]), 3)
    routed = expert_route(logits, Routing(2), torch.full((1, 3), 99), 3, TokenBatch(None), ONE_TILE)
    assert routed.tiles[:, 0].tolist() == [0, 1, 2]


# -- LoRA ---


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 16, 16), (13, 7, 33), (100, 24, 5)])
def test_lora(popularity: str, tokens: int, width: int, inner: int) -> None:
    """A site of two slices, of which each adapter has weights for one or both."""
    ranks = {1: 1, 2: 5, 4: 8, 5: 16, 6: 64}  # slot 3 has a LoRA, but none on this linear; slot 0 is the base
    site = LoraSite([inner, 3])
    for slot, rank in ranks.items():
        for index, out in enumerate(site.widths):
            if slot % 3 != index:
                site.put(slot, index, LoraWeights(torch.randn(rank, width), torch.randn(out, rank), 0.1 * slot))
    slots = sorted(pick(popularity, tokens, 7, random.Random(3)))
    spans = [
        Segment(slots.index(slot), len(slots) - slots[::-1].index(slot), slot) for slot in sorted(set(slots)) if slot
    ]
    x, y = torch.randn(tokens, width), torch.randn(tokens, inner + 3)
    got = y.clone()
    lora(got, x, site, Segments(spans))
    for token, slot in enumerate(slots):
        expected = y[token].clone()
        for weights, part in zip(site.by_slot.get(slot, []), expected.split([inner, 3]), strict=False):
            if weights is not None:
                part += weights.scale * (weights.b @ (weights.a @ x[token]))
        torch.testing.assert_close(got[token], expected, atol=5 * ATOL, rtol=1e-5)
