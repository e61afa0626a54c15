"""GPT-2's linears, which are stored [in, out]: as the linears that all else is made for.

PEFT writes the same low-rank matrices for them as for others (fan_in_fan_out says how the base's lie, no more).
"""

import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers.pytorch_utils import Conv1D


@torch.no_grad()
def straighten(model: nn.Module) -> None:
    """Put a linear in the place of each, with its own copy of the weights: one at a time is held twice."""
    for parent in list(model.modules()):
        for name, it in list(parent.named_children()):
            if isinstance(it, Conv1D):
                setattr(parent, name, _linear(it))


def _linear(it: Conv1D) -> nn.Linear:
    linear: nn.Linear = skip_init(nn.Linear, it.nx, it.nf, dtype=it.weight.dtype, device=it.weight.device)
    linear.weight = nn.Parameter(it.weight.T.contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(it.bias.detach(), requires_grad=False)
    return linear
