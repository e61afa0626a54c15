"""Reference of rms_norm: what Transformers' norm modules compute, with each family's own rounding.

| family | call |
|---|---|
| Llama, Mistral, Qwen, DeepSeek, OLMoE, Phi-3 | the defaults: weight * normed.to(dtype) |
| gpt-oss | cast_first=False: (weight * normed).to(dtype) |
| Gemma 2 | cast_first=False, offset=1: (normed * (1 + weight)).to(dtype) |
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension.

    x [.., H], any strides; weight [H]. Returns x's shape and dtype, contiguous. The norm is computed in float32.
    cast_first: round it to x's dtype before the product with the weight, as most families do.
    """
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    scale = offset + weight.to(torch.float32) if offset else weight
    return ((normed.to(x.dtype) if cast_first else normed) * scale).to(x.dtype).contiguous()


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = True
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): the sum is rounded to x's dtype before it is normed.

    x and residual [.., H], of one shape and dtype; the other arguments as of rms_norm. Both results are new and
    contiguous.
    """
    total = (x + residual).contiguous()
    return rms_norm(total, weight, eps, offset, cast_first), total
