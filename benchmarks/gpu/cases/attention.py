"""Attention over paged caches as Llama-3.1-8B and DeepSeek-V2-Lite have them, and what writes those."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Draw
from tests.support.device_batch import device_batch


class _Shape(NamedTuple):
    name: str
    heads: int
    kv_heads: int
    dim: int
    value_dim: int  # below dim: values are the first columns of keys (latent attention)
    sequences: list[tuple[int, int]]  # new tokens, keys


def _shapes(draw: Draw) -> list[_Shape]:
    size, toy = draw.scale.size, draw.scale.is_toy
    llama = (4, 2, 24, 24) if toy else (32, 8, 128, 128)
    latent = (4, 1, 24, 16) if toy else (16, 1, 576, 512)
    decodes = [(1, size(1024, 9))] * size(32, 2)
    long = [(1, size(16384, 20))] * size(2, 1)
    mixed = [(size(512, 4), size(1024, 6))] + [(1, size(700, 5))] * size(16, 1)
    uneven = [(1, size(8192, 20))] + [(1, size(512, 5))] * size(31, 2)
    return [
        _Shape("llama decode", *llama, decodes),
        _Shape("llama decode long", *llama, long),
        _Shape("llama decode, one of them long", *llama, uneven),
        _Shape("llama mixed", *llama, mixed),
        _Shape("llama prefill", *llama, [(size(2048, 6), size(2048, 6))]),
        _Shape("latent decode", *latent, decodes),
        _Shape("latent decode long", *latent, long),
        _Shape("latent prefill", *latent, [(size(1024, 6), size(1024, 6))]),
    ]


def paged_attention(draw: Draw) -> Iterator[Case]:
    for shape in _shapes(draw):
        yield _attention_case(draw, shape)


def _attention_case(draw: Draw, shape: _Shape) -> Case:
    from kernels.paged_attention import AttentionBatch
    from kernels.paged_attention.kernel import paged_attention
    from kernels.paged_attention.reference import paged_attention as wanted

    block_size, sequences = draw.scale.size(16, 4), shape.sequences
    counts = [-(-keys // block_size) for _, keys in sequences]
    blocks = list(range(sum(counts) + 4))
    draw.rng.shuffle(blocks)
    tables = [[blocks.pop() for _ in range(count)] for count in counts]
    query = draw.randn(sum(new for new, _ in sequences), shape.heads, shape.dim)
    total_keys, per_key = sum(keys for _, keys in sequences), _key_bytes(shape, query)
    caches = [_caches(draw, shape, sum(counts) + 4, block_size) for _ in range(draw.scale.copies(total_keys * per_key))]
    lists = [new for new, _ in sequences], [keys for _, keys in sequences], tables
    batch, on_device = AttentionBatch(*lists, block_size, draw.dtype), device_batch(*lists, draw.device)
    scale = shape.dim**-0.5
    pairs = sum(new * keys - new * (new - 1) // 2 for new, keys in sequences)
    results = query.nbytes * (shape.dim + shape.value_dim) // shape.dim
    return Case(
        "paged_attention", f"{shape.name}, {len(sequences)} sequences of {max(keys for _, keys in sequences)}",
        draw.dtype, lambda: paged_attention(query, *caches[0], on_device, scale, None, None, None, None),
        lambda: wanted(query, *caches[0], batch, scale),
        [lambda it=it: paged_attention(query, *it, on_device, scale, None, None, None, None) for it in caches],
        total_keys * per_key + results, 2 * pairs * shape.heads * (shape.dim + shape.value_dim),
        counters=(on_device.counters,),
    )  # fmt: skip


def _key_bytes(shape: _Shape, like: Tensor) -> int:
    """Of one token's key and value."""
    is_latent = shape.value_dim < shape.dim
    return shape.kv_heads * (shape.dim if is_latent else shape.dim + shape.value_dim) * like.itemsize


def _caches(draw: Draw, shape: _Shape, blocks: int, block_size: int) -> tuple[Tensor, Tensor]:
    keys = draw.randn(blocks, block_size, shape.kv_heads, shape.dim)
    if shape.value_dim < shape.dim:
        return keys, keys[..., : shape.value_dim]
    return keys, draw.randn(blocks, block_size, shape.kv_heads, shape.value_dim)


def store_kv(draw: Draw) -> Iterator[Case]:
    from kernels.store_kv import kernel, reference

    tokens, heads, dim = draw.scale.size(256, 5), draw.scale.size(8, 2), draw.scale.size(128, 8)
    key, value = draw.randn(tokens, heads, dim), draw.randn(tokens, heads, dim)
    slot_mapping = torch.randperm(4 * tokens, device=draw.device, dtype=torch.int32)[:tokens]

    def caches() -> Tensor:
        return torch.zeros(2, tokens, 4, heads, dim, device=draw.device, dtype=draw.dtype)

    def stored(store: Callable[..., None]) -> tuple[Tensor, Tensor]:
        to = caches()
        store(key, value, to[0], to[1], slot_mapping)
        return to[0], to[1]

    to = caches()
    yield Case("store_kv", f"{tokens} tokens", draw.dtype, lambda: stored(kernel.store_kv),
               lambda: stored(reference.store_kv), [lambda: kernel.store_kv(key, value, to[0], to[1], slot_mapping)],
               4 * key.nbytes, exact=True)  # fmt: skip
