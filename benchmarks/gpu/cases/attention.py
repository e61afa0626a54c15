"""Attention over paged caches as Llama-3.1-8B and DeepSeek-V2-Lite have them, and what writes those."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.cases.case import Case, Draw
from tests.support.device_batch import device_batch


class Shape(NamedTuple):
    name: str
    heads: int
    kv_heads: int
    dim: int
    value_dim: int  # below dim: values are the first columns of keys (latent attention)
    sequences: list[tuple[int, int]]  # new tokens, keys

    @property
    def new(self) -> list[int]:
        return [new for new, _ in self.sequences]

    @property
    def keys(self) -> list[int]:
        return [keys for _, keys in self.sequences]


def shapes(draw: Draw) -> list[Shape]:
    size, toy = draw.scale.size, draw.scale.is_toy
    llama = (4, 2, 24, 24) if toy else (32, 8, 128, 128)
    latent = (4, 1, 24, 16) if toy else (16, 1, 576, 512)
    decodes = [(1, size(1024, 9))] * size(32, 2)
    long = [(1, size(16384, 20))] * size(2, 1)
    mixed = [(size(512, 4), size(1024, 6))] + [(1, size(700, 5))] * size(16, 1)
    uneven = [(1, size(8192, 20))] + [(1, size(512, 5))] * size(31, 2)
    return [
        Shape("llama decode", *llama, decodes),
        Shape("llama decode long", *llama, long),
        Shape("llama decode, one of them long", *llama, uneven),
        Shape("llama mixed", *llama, mixed),
        Shape("llama prefill", *llama, [(size(2048, 6), size(2048, 6))]),
        Shape("latent decode", *latent, decodes),
        Shape("latent decode long", *latent, long),
        Shape("latent prefill", *latent, [(size(1024, 6), size(1024, 6))]),
    ]


def paged_attention(draw: Draw) -> Iterator[Case]:
    for shape in shapes(draw):
        yield _attention_case(draw, shape)


@dataclass(frozen=True)
class Paged:
    """A batch over caches that hold the same, so many that they outgrow the device's."""

    shape: Shape
    query: Tensor  # [T, heads, dim]
    caches: list[tuple[Tensor, Tensor]]  # [blocks, block size, key heads, dim]
    tables: list[list[int]]

    @classmethod
    def drawn(cls, draw: Draw, shape: Shape) -> "Paged":
        block_size = draw.scale.size(16, 4)
        counts = [-(-keys // block_size) for _, keys in shape.sequences]
        blocks = list(range(sum(counts) + 4))
        draw.rng.shuffle(blocks)
        tables = [[blocks.pop() for _ in range(count)] for count in counts]
        query = draw.randn(sum(shape.new), shape.heads, shape.dim)
        copies = draw.scale.copies(sum(shape.keys) * _key_bytes(shape, query))
        return cls(shape, query, [_caches(draw, shape, sum(counts) + 4, block_size) for _ in range(copies)], tables)

    @property
    def block_size(self) -> int:
        return self.caches[0][0].shape[1]

    @property
    def lists(self) -> tuple[list[int], list[int], list[list[int]]]:
        return self.shape.new, self.shape.keys, self.tables

    @property
    def num_bytes(self) -> int:
        results = self.query.nbytes * (self.shape.dim + self.shape.value_dim) // self.shape.dim
        return sum(self.shape.keys) * _key_bytes(self.shape, self.query) + results

    @property
    def num_ops(self) -> int:
        pairs = sum(new * keys - new * (new - 1) // 2 for new, keys in self.shape.sequences)
        return 2 * pairs * self.shape.heads * (self.shape.dim + self.shape.value_dim)


def _attention_case(draw: Draw, shape: Shape) -> Case:
    from kernels.paged_attention import AttentionBatch
    from kernels.paged_attention.kernel import paged_attention
    from kernels.paged_attention.reference import paged_attention as wanted

    it = Paged.drawn(draw, shape)
    batch, on_device = AttentionBatch(*it.lists, it.block_size, draw.dtype), device_batch(*it.lists, draw.device)
    query, scale = it.query, shape.dim**-0.5
    return Case(
        "paged_attention", f"{shape.name}, {len(shape.sequences)} sequences of {max(shape.keys)}",
        draw.dtype, lambda: paged_attention(query, *it.caches[0], on_device, scale, None, None, None, None),
        lambda: wanted(query, *it.caches[0], batch, scale),
        [lambda pair=pair: paged_attention(query, *pair, on_device, scale, None, None, None, None)
         for pair in it.caches],
        it.num_bytes, it.num_ops, counters=(on_device.counters,),
    )  # fmt: skip


def _key_bytes(shape: Shape, like: Tensor) -> int:
    """Of one token's key and value."""
    is_latent = shape.value_dim < shape.dim
    return shape.kv_heads * (shape.dim if is_latent else shape.dim + shape.value_dim) * like.itemsize


def _caches(draw: Draw, shape: Shape, blocks: int, block_size: int) -> tuple[Tensor, Tensor]:
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
