"""Reference of gated, in plain torch: what Transformers' gated layers compute."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gated.activation import Act, Activation, split_gate_up


def gated(products: Tensor, activation: Activation, interleaved: bool = False) -> Tensor:
    """products [.., 2I] -> act(gate) * up [.., I], in the type of the products.

    interleaved: gate and up alternate; otherwise all gates come before all ups.
    """
    gate, up = split_gate_up(products, interleaved)
    match activation.act:
        case Act.SILU:
            return F.silu(gate) * up
        case Act.GELU_TANH:
            return F.gelu(gate, approximate="tanh") * up
        case Act.GELU:
            return F.gelu(gate) * up
        case Act.CLAMPED:
            gate = gate.clamp(max=activation.limit)
            up = up.clamp(-activation.limit, activation.limit)
            return (up + 1) * gate * torch.sigmoid(gate * activation.alpha)
