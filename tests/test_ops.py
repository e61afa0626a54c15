"""Each op against the obvious computation, on odd shapes, with unwritten memory poisoned."""

import math
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.expert_route import expert_route
from kernels.grouped_gemm import combine, grouped_gemm
from kernels.lora import LoraWeights, Segment, lora
from kernels.paged_attention import AttentionBatch, paged_attention
from kernels.store_kv import store_kv

ATOL = 2e-5  # float32 sums of up to a few hundred products of order 1
POPULARITIES = ("distinct", "uniform", "zipf", "identical", "skewed")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What torch.empty hands out reads as NaN, so an output that is not written shows."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *args, **kwargs: poison(new_empty(self, *args, **kwargs)))
    torch.manual_seed(0)
    yield


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


def test_expert_route_on_the_papers_example() -> None:
    """ExpertWeave (arXiv 2508.17624), figure 4: M = 64, E_max = 8, adapters that tune 3 and 7 experts."""
    tuned = {1: [3, 14, 47], 2: [5, 13, 14, 27, 35, 57, 59]}
    expert_map = torch.arange(64).repeat(3, 1)
    for adapter, experts in tuned.items():
        expert_map[adapter, experts] = 64 + (adapter - 1) * 8 + torch.arange(len(experts))
    chosen = torch.tensor([[15, 14, 45, 47, 3, 57], [31, 13, 62, 12, 34, 14], [26, 47, 31, 3, 58, 60],
                           [13, 31, 14, 35, 15, 5], [8, 27, 35, 59, 5, 63], [57, 5, 3, 13, 27, 59]])  # fmt: skip
    adapters = torch.tensor([0, 1, 1, 2, 2, 2])
    expected = [[15, 14, 45, 47, 3, 57], [31, 13, 62, 12, 34, 65], [26, 66, 31, 64, 58, 60],
                [73, 31, 74, 76, 15, 72], [8, 75, 76, 78, 72, 63], [77, 72, 3, 73, 75, 78]]  # fmt: skip
    buckets = expert_route(chosen, adapters, expert_map)
    slots = torch.repeat_interleave(torch.tensor(buckets.slots), torch.tensor(buckets.counts))
    rerouted = torch.empty(36, dtype=torch.int64)
    rerouted[buckets.pairs] = slots
    assert rerouted.view(6, 6).tolist() == expected
    assert buckets.slots == sorted(set(buckets.slots)) and sum(buckets.counts) == 36


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 8, 12), (7, 5, 9), (64, 16, 8)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_gemm(popularity: str, tokens: int, width: int, inner: int, transposed: bool, bias: bool) -> None:
    experts, choices, slots = 6, 3, 40
    rng = random.Random(2)
    expert_map = torch.arange(experts).repeat(4, 1)
    expert_map[1, [0, 4]] = torch.tensor([6, 7])
    expert_map[3, 2] = 33
    ids = torch.stack([torch.randperm(experts)[:choices] for _ in range(tokens)])
    adapters = torch.tensor(pick(popularity, tokens, 4, rng))
    stack = torch.randn(slots, inner, width)
    used = torch.unique(expert_map[adapters[:, None], ids])
    stack[[slot for slot in range(slots) if slot not in used]] = math.nan  # nobody may read an unused slot
    biases = torch.randn(slots, inner) if bias else None
    hidden, weights = torch.randn(tokens, width), torch.rand(tokens, choices)
    buckets = expert_route(ids, adapters, expert_map)
    stored = stack.transpose(1, 2).contiguous() if transposed else stack
    rows = grouped_gemm(hidden[buckets.pairs // choices], stored, buckets, biases, transposed)
    got = combine(rows, buckets, weights)
    for token in range(tokens):
        expected = torch.zeros(inner)
        for choice in range(choices):
            slot = expert_map[adapters[token], ids[token, choice]]
            product = stack[slot] @ hidden[token] + (0 if biases is None else biases[slot])
            expected += weights[token, choice] * product
        torch.testing.assert_close(got[token], expected, atol=ATOL, rtol=0)


def test_base_only_batches_are_not_rerouted() -> None:
    ids = torch.tensor([[2, 0], [1, 2]])
    assert expert_route(ids, None, torch.full((1, 3), 99)).slots == [0, 1, 2]


# -- LoRA ---


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 16, 16), (13, 7, 33), (100, 24, 5)])
def test_lora(popularity: str, tokens: int, width: int, inner: int) -> None:
    ranks = {1: 1, 2: 5, 4: 8, 5: 16, 6: 64}  # slot 3 has a LoRA, but none on this linear; slot 0 is the base
    weights = {
        slot: LoraWeights(torch.randn(rank, width), torch.randn(inner, rank), 0.1 * slot)
        for slot, rank in ranks.items()
    }
    slots = sorted(pick(popularity, tokens, 7, random.Random(3)))
    segments = [
        Segment(slots.index(slot), len(slots) - slots[::-1].index(slot), slot) for slot in sorted(set(slots)) if slot
    ]
    x, y = torch.randn(tokens, width), torch.randn(tokens, inner)
    got = y.clone()
    lora(got, x, weights, segments)
    for token, slot in enumerate(slots):
        expected = y[token].clone()
        if slot in weights:
            expected += weights[slot].scale * (weights[slot].b @ (weights[slot].a @ x[token]))
        torch.testing.assert_close(got[token], expected, atol=5 * ATOL, rtol=1e-5)
