"""paged_attention's reference against the obvious computation, on odd shapes, with unwritten memory poisoned."""

import random

import pytest
import torch
from torch import Tensor

from kernels.paged_attention import AttentionBatch, paged_attention
from kernels.store_kv import store_kv

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ATOL = 2e-5  # float32 sums of up to a few hundred products of order 1


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
        slot_mapping = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(len(key))])
        store_kv(key, value, key_cache, value_cache, slot_mapping)
    queries = [torch.randn(query_len, heads, dim) for query_len, _ in shapes]
    sinks = torch.randn(heads) if options.get("sinks") else None
    window, softcap = options.get("window"), options.get("softcap")
    batch = AttentionBatch([q for q, _ in shapes], [kv for _, kv in shapes], tables, block_size, torch.float32)
    got = paged_attention(torch.cat(queries), key_cache, value_cache, batch, 0.3, window, softcap, sinks)  # type: ignore[arg-type]
    expected = [
        naive_attention(q, k, v, 0.3, window, softcap, sinks) for q, k, v in zip(queries, keys, values, strict=True)
    ]  # type: ignore[arg-type]
    torch.testing.assert_close(got, torch.cat(expected), atol=ATOL, rtol=0)
