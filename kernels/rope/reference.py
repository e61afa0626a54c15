"""Reference of rope: Transformers' rotary embeddings, in its two pairings.

| function there | call here |
|---|---|
| `apply_rotary_pos_emb`, cos of D columns (Llama, Qwen, Gemma, ...) | rope(query, key, cos, sin) |
| `apply_rotary_pos_emb` of gpt-oss, cos of D / 2 columns | the same |
| `apply_rotary_pos_emb_interleave` (DeepSeek-V3) | rope(query, key, cos, sin, interleaved=True) |
| `apply_rotary_emb`, complex frequencies (DeepSeek-V2) | rope_complex(query, key, view_as_real(freqs_cis)) |

All return a query and a key [1, heads, T, D] in memory as [1, T, heads, D], which is how attention reads them.
"""

import torch
from torch import Tensor


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotate every head by its token's angles.

    query [1, Hq, T, D], key [1, Hkv, T, D]; cos, sin [1, T, D / 2], or [1, T, D] with both halves alike.
    Pair i is elements i and i + D / 2. interleaved: it is elements 2i and 2i + 1, and its results go to i and
    i + D / 2.
    """
    half = query.shape[-1] // 2
    cos, sin = cos[..., :half].unsqueeze(1), sin[..., :half].unsqueeze(1)
    return _rotate(query, cos, sin, interleaved), _rotate(key, cos, sin, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return _by_token(rotated)


def rope_complex(query: Tensor, key: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate every head by its token's angles, in float32. Pair i is elements 2i and 2i + 1, and stays there.

    query [1, Hq, T, D], key [1, Hkv, T, D]; frequencies [1, T, D / 2, 2] float32: cosine and sine for each pair, both
    times the model's attention scaling.
    """
    turn = torch.view_as_complex(frequencies).unsqueeze(1)

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return _by_token(torch.view_as_real(pairs * turn).flatten(3).type_as(x))

    return rotate(query), rotate(key)


def _by_token(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)
