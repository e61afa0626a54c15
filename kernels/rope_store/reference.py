"""Reference of rope_store: the ops that it is made of, one after another."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.rms_norm import reference as norms_reference
from kernels.rope import reference as rope_reference
from kernels.rope_store.heads import HeadNorms, Heads
from kernels.store_kv import reference as store_reference

Rope = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def rope_store(
    qkv: Tensor,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    norms: HeadNorms | None = None,
) -> Tensor:
    """Store the step's keys and values; returns its queries [T, query heads, dim], contiguous.

    qkv [T, sum of heads.widths], rows of any distance. cos, sin [1, T, at least rotated / 2], of which the first
    rotated / 2 count. key_cache, value_cache and slot_mapping as in store_kv.
    """
    query, key, value = turned(qkv, heads, cos, sin, norms)
    store_reference.store_kv(key, value, key_cache, value_cache, slot_mapping)
    return query


def turned(
    qkv: Tensor,
    heads: Heads,
    cos: Tensor,
    sin: Tensor,
    norms: HeadNorms | None,
    rms_norm: Callable[..., Tensor] = norms_reference.rms_norm,
    rope: Rope = rope_reference.rope,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [T, heads, ..] as attention takes them, by these implementations of the ops."""
    tokens = len(qkv)
    query, key, value = qkv.split(heads.widths, dim=-1)
    query, key = query.view(tokens, heads.query, heads.dim), key.view(tokens, heads.kv, heads.dim)
    value = value.view(tokens, heads.kv, heads.value_dim)
    if norms is not None:
        query, key = rms_norm(query, norms.query, *norms[2:]), rms_norm(key, norms.key, *norms[2:])
    first = query, key
    if heads.rotated < heads.dim:
        first = query[..., : heads.rotated], key[..., : heads.rotated]
    turned_query, turned_key = rope(first[0].transpose(0, 1)[None], first[1].transpose(0, 1)[None], cos, sin)
    first = turned_query[0].transpose(0, 1), turned_key[0].transpose(0, 1)
    if heads.rotated == heads.dim:
        return *first, value
    rest = query[..., heads.rotated :], key[..., heads.rotated :]
    return torch.cat([first[0], rest[0]], -1), torch.cat([first[1], rest[1]], -1), value
