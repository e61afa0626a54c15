"""Linears that add each request's own LoRA. Those that read the same input are computed as one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.lora import LoraSite, SiteAdapters, lora
from server.model.inputs import CurrentStep, lora_acts


class LoraLinear(nn.Module):
    """One or several nn.Linear of one input, weights and all: one product, one site of LoRA."""

    def __init__(self, linears: list[nn.Linear], is_lm_head: bool, step: CurrentStep) -> None:
        super().__init__()
        self.site = LoraSite(tuple(linear.out_features for linear in linears))
        self.adapters = SiteAdapters()
        self.in_features = linears[0].in_features
        # logits are computed for sampled rows only, so their tiles are other ones
        self._is_lm_head = is_lm_head
        self._step = step
        if len(linears) == 1:  # its own weight, which may be tied to the embedding
            self.weight, self.bias = linears[0].weight, linears[0].bias
        else:
            self.weight = nn.Parameter(torch.cat([linear.weight.data for linear in linears]), requires_grad=False)
            self.bias = _joint_bias(linears)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        rows = self._step.inputs.rows
        if lora_acts(self.adapters, rows):
            tiles = rows.sampled if self._is_lm_head else rows.tiles
            lora(y.view(-1, y.shape[-1]), x.reshape(-1, self.in_features), self.site, self.adapters, tiles,
                 rows.shape.rank, self.bias)  # fmt: skip
        return y


def _joint_bias(linears: list[nn.Linear]) -> nn.Parameter | None:
    if all(linear.bias is None for linear in linears):
        return None
    parts = [linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.data
             for linear in linears]  # fmt: skip
    return nn.Parameter(torch.cat(parts), requires_grad=False)


class SharedInput:
    """The last product of a group of siblings, until each of them has taken its columns of it."""

    def __init__(self, fused: LoraLinear) -> None:
        self._fused = fused
        self._x: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def take(self, index: int, x: Tensor) -> Tensor:
        """Slice `index` of fused(x). The first sibling to come computes for all."""
        if self._x is not x or self._parts[index] is None:
            self._x, self._parts = x, list(self._fused(x).split(self._fused.site.widths, dim=-1))
        part = self._parts[index]
        assert part is not None
        self._parts[index] = None
        if not any(part is not None for part in self._parts):
            self._x = None  # nothing is kept alive between steps
        return part


class LinearSlice(nn.Module):
    """Takes the place of one linear among siblings."""

    def __init__(self, fused: LoraLinear, shared: SharedInput, index: int) -> None:
        super().__init__()
        self.fused = fused
        self._shared, self._index = shared, index

    def forward(self, x: Tensor) -> Tensor:
        return self._shared.take(self._index, x)
