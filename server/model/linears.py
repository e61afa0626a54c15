"""Linears that adapters act on. Those that read the same input are computed as one."""

from collections.abc import Sequence

from torch import Tensor, nn

from server.model.product import Product
from server.model.site_op import SiteOp, begin_all


class AdaptedLinear(nn.Module):
    """One product, and after it the ops of every kind of part, in order."""

    def __init__(self, product: Product, ops: Sequence[SiteOp]) -> None:
        super().__init__()
        self.product, self._ops = product, tuple(ops)

    def forward(self, x: Tensor) -> Tensor:
        begun = begin_all(self._ops, x)
        y: Tensor = self.product(x)
        for finish in begun:
            finish(y.view(-1, y.shape[-1]))
        return y


class SharedInput:
    """The last product of a group of siblings, until each of them has taken its columns of it."""

    def __init__(self, fused: AdaptedLinear) -> None:
        self._fused = fused
        self._x: Tensor | None = None
        self._parts: list[Tensor | None] = []

    def take(self, index: int, x: Tensor) -> Tensor:
        """Slice `index` of fused(x). The first sibling to come computes for all."""
        if self._x is not x or self._parts[index] is None:
            self._x, self._parts = x, list(self._fused(x).split(self._fused.product.widths, dim=-1))
        part = self._parts[index]
        assert part is not None
        self._parts[index] = None
        if not any(part is not None for part in self._parts):
            self._x = None  # nothing is kept alive between steps
        return part


class LinearSlice(nn.Module):
    """Takes the place of one linear among siblings."""

    def __init__(self, fused: AdaptedLinear, shared: SharedInput, index: int) -> None:
        super().__init__()
        self.fused = fused  # in the module tree, so that it moves to a device with the model
        self.index, self._shared = index, shared

    def forward(self, x: Tensor) -> Tensor:
        return self._shared.take(self.index, x)
