"""Rows to norm that are not contiguous, for the tests of every implementation."""

import math

import torch
from torch import Tensor

from tests.support.kernel_device import DEVICE


def views(tokens: int) -> dict[str, Tensor]:
    """What models norm that is not contiguous; what lies between the rows is NaN."""
    poison = math.nan
    latent = torch.full((1, tokens, 48), poison, device=DEVICE)  # kv_a_proj: the latent, then the rotary key
    latent[..., :32] = torch.randn(1, tokens, 32)
    fused = torch.full((1, tokens, 8, 32), poison, device=DEVICE)  # heads of queries in a fused projection
    fused[:, :, 2:5] = torch.randn(1, tokens, 3, 32)
    whole = torch.full((2, tokens + 1, 4, 32), poison, device=DEVICE)
    whole[:, :tokens, 1:] = torch.randn(2, tokens, 3, 32)
    return {
        "latent": latent[..., :32],
        "heads": fused[:, :, 2:5],
        "transposed": fused[:, :, 2:5].transpose(1, 2),
        "three strides": whole[:, :tokens, 1:],
        "repeated": torch.randn(1, 1, 32, device=DEVICE).expand(1, tokens, 32),
        "columns": torch.randn(1, 32, tokens, device=DEVICE).transpose(1, 2),
    }
