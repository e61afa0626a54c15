"""The definition of a linear's product."""

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in], weight [out, in], bias [out] -> [T, out]."""
    return F.linear(x, weight, bias)
