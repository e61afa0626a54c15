"""A linear's own product, before anything that adapters do to it: of one module, or of several of one input at once."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Product(Protocol):
    """x [.., in] -> y [.., sum of widths], slice by slice."""

    widths: tuple[int, ...]
    in_features: int
    bias: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """Of x and y."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def rows(self, index: int) -> Tensor:
        """[width, in]: slice `index` as a dense matrix, without the bias; what is derived from the base reads it."""


class DenseProduct(nn.Module):
    """Plain weights, those of several modules one below the other."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.widths = tuple(linear.out_features for linear in linears)
        self.in_features = linears[0].in_features
        self.bias: Tensor | None
        if len(linears) == 1:  # its own weight, which may be tied to the embedding
            self.weight, self.bias = linears[0].weight, linears[0].bias
        else:
            self.weight = nn.Parameter(torch.cat([linear.weight.data for linear in linears]), requires_grad=False)
            self.bias = _joint_bias(linears)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def rows(self, index: int) -> Tensor:
        start = sum(self.widths[:index])
        return self.weight[start : start + self.widths[index]]


def is_linear(module: nn.Module) -> bool:
    """Whether all that it does is a product with a matrix [out, in], and perhaps a bias: nn.Linear, and whatever is
    made of it without changing what it computes."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def product_of(linears: Sequence[nn.Module]) -> DenseProduct:
    """Of modules that `is_linear` takes, all of one input."""
    dense = [linear for linear in linears if isinstance(linear, nn.Linear)]
    assert len(dense) == len(linears) and len({linear.in_features for linear in dense}) == 1
    return DenseProduct(dense)


def _joint_bias(linears: Sequence[nn.Linear]) -> nn.Parameter | None:
    if all(linear.bias is None for linear in linears):
        return None
    parts = [linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.data
             for linear in linears]  # fmt: skip
    return nn.Parameter(torch.cat(parts), requires_grad=False)
