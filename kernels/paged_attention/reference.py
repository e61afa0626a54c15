"""Reference of paged_attention.

Where several query heads share a key head, they become further rows of one product: torch's `enable_gqa` would copy the
keys and values for each of them on the CPU. Decodes are computed a few at a time, padded to the longest of them: one
gather and one call for a few sequences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.paged_attention.batch import AttentionBatch, PrefillChunk

MAX_SCORES = 32 << 20  # elements of a prefill chunk's scores and mask that exist at once


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Causal attention of each token over its own sequence; returns [T, Hq, Dv], zero for sequences without keys.

    query [T, Hq, D]; key_cache [blocks, block_size, Hkv, D], value_cache [blocks, block_size, Hkv, Dv]. Hq is a
    multiple of Hkv. The caches hold the step's own tokens already. The rest of a sequence's last block is read and
    masked, so it must be finite.
    batch: whose rows and whose blocks are whose. scale: scores are multiplied by it.
    window: a token sees itself and window - 1 tokens before it. chunk: it sees tokens of its own chunk only, those
    with the same position // chunk (Llama 4). softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
    sinks [Hq]: a score for each head that takes part in the softmax and has no value (gpt-oss).
    """
    kv_heads = key_cache.shape[2]
    group = query.shape[1] // kv_heads
    out = query.new_zeros(*query.shape[:2], value_cache.shape[-1])
    if sinks is not None:
        sinks = sinks.view(kv_heads, group)
    chunks, decodes = batch.plan(window, chunk, query.device)
    for prefill in chunks:
        rows = query[prefill.start : prefill.end]
        out[prefill.start : prefill.end] = _prefill(rows, key_cache, value_cache, prefill, scale, softcap, sinks)
    for decode in decodes:
        count = len(decode.rows)
        key, value = _gather(key_cache, decode.blocks, count), _gather(value_cache, decode.blocks, count)
        folded = query.index_select(0, decode.rows).unflatten(1, (kv_heads, group))  # [n, Hkv, G, D]
        attended = _attend(folded, key, value, decode.mask, scale, softcap, sinks)
        out.index_copy_(0, decode.rows, attended.flatten(1, 2))
    return out


def _prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    chunk: PrefillChunk,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """query [q, Hq, D] of one sequence, sinks [Hkv, G] -> [q, Hq, Dv]; a few queries at a time where keys are many."""
    kv_heads = key_cache.shape[2]
    group = query.shape[1] // kv_heads
    key = _gather(key_cache, chunk.blocks, 1)[:, :, : chunk.num_keys]
    value = _gather(value_cache, chunk.blocks, 1)[:, :, : chunk.num_keys]
    at_once = max(1, MAX_SCORES // (query.shape[1] * chunk.num_keys))
    parts: list[Tensor] = []
    for rows, mask in zip(query.split(at_once), chunk.mask.split(at_once), strict=True):
        # [q, Hkv, G, D] -> [1, Hkv, G * q, D]
        folded = rows.unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3).flatten(1, 2)[None]
        row_sinks = None if sinks is None else sinks.repeat_interleave(len(rows), 1)
        attended = _attend(folded, key, value, mask.repeat(group, 1), scale, softcap, row_sinks)
        parts.append(attended[0].unflatten(1, (group, len(rows))).permute(2, 0, 1, 3).flatten(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gather(cache: Tensor, blocks: Tensor, sequences: int) -> Tensor:
    """[n * b] blocks of n sequences -> [n, Hkv, b * block_size, D]."""
    taken = cache.index_select(0, blocks)
    return taken.view(sequences, -1, *cache.shape[2:]).transpose(1, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """query [n, H, R, D], key and value [n, H, K, ..], mask like [n, H, R, K], sinks [H, R] -> [n, H, R, Dv]."""
    if softcap is None and sinks is None:
        # torch's fused kernel wants values as wide as keys (MLA's are not); its fallback takes ten times as long
        narrower = key.shape[-1] - value.shape[-1]
        padded = F.pad(value, (0, narrower)) if narrower > 0 else value
        attended = F.scaled_dot_product_attention(query, key, padded, attn_mask=mask, scale=scale)
        return attended[..., : value.shape[-1]]
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is None:
        return torch.softmax(scores, -1).to(value.dtype) @ value
    logits = sinks.float().expand(len(scores), -1, -1)[..., None]
    return torch.softmax(torch.cat([scores, logits], -1), -1)[..., :-1].to(value.dtype) @ value
