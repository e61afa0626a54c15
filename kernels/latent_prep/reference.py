"""Reference of latent_prep: rms_norm, rope and store_latent, one after the other."""

import torch
from torch import Tensor

from kernels.latent_prep.pairing import Pairing, Turns
from kernels.rms_norm.reference import rms_norm
from kernels.rope.reference import rope, rope_complex
from kernels.store_kv.reference import store_latent


def latent_prep(
    query: Tensor, compressed: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool, turns: Turns,
    cache: Tensor, slot_mapping: Tensor, absorbed: Tensor,
) -> None:  # fmt: skip
    """Norm latents, rotate keys and queries, and write them where attention reads them.

    query [T, H, R]: what is rotated of each head's query; rows may be strided, as of all. compressed [T, L + R]:
    latents and what is rotated of the keys. weight [L], eps, offset, cast_first: of their norm, as in rms_norm.
    cache [blocks, block_size, 1, L + R], slot_mapping [T]: as in store_latent; a negative KV slot writes nothing.
    absorbed [T, H, L + R]: its last R columns are written, for every token.
    """
    rotary = query.shape[-1]
    latent, key = compressed.split([compressed.shape[-1] - rotary, rotary], -1)
    heads, shared = query.transpose(0, 1)[None], key[None, None]  # [1, heads, T, R]
    if turns.pairing == Pairing.ADJACENT:
        frequencies = torch.stack([turns.cos, turns.sin], -1)[None, :, : rotary // 2].float()
        heads, shared = rope_complex(heads.contiguous(), shared.contiguous(), frequencies)
    else:
        interleaved = turns.pairing == Pairing.INTERLEAVED
        heads, shared = rope(heads, shared, turns.cos[None], turns.sin[None], interleaved)
    store_latent(rms_norm(latent, weight, eps, offset, cast_first), shared[0, 0], cache, slot_mapping)
    absorbed[..., -rotary:] = heads[0].transpose(0, 1)
