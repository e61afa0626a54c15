"""Linears that adapters act on. Those that read the same input are computed as one."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from kernels.lora.delta import Delta
from server.model.branch import Branch
from server.model.product import Product
from server.model.site_op import SiteOp, begin_all


class Deferred(NamedTuple):
    """y [.., width], and what adapters add to it where its reader adds that; None: y is all."""

    y: Tensor
    delta: Delta | None = None


class AdaptedLinear(nn.Module):
    """One product, and the ops of every kind of part: after it, in order, or where its reader takes what they add."""

    def __init__(self, product: Product, ops: Sequence[SiteOp], branch: Branch | None = None) -> None:
        """branch: where what adapters add is begun, for a reader that adds it. None: there is no such reader."""
        super().__init__()
        self.product, self._ops, self._branch = product, tuple(ops), branch

    def forward(self, x: Tensor, deltas: list[Delta] | None = None) -> Tensor:
        """deltas: None, or an empty list: what is put there is not in y yet."""
        if deltas is not None and (y := self._without_delta(x, deltas)) is not None:
            return y
        begun = begin_all(self._ops, x)
        y = self.product(x)
        for finish in begun:
            finish(y.view(-1, y.shape[-1]))
        return y

    def deferred(self, x: Tensor) -> Deferred:
        """For a reader that adds what adapters add."""
        deltas: list[Delta] = []
        y: Tensor = self(x, deltas)  # through hooks, which the parity check merges adapters by
        return Deferred(y, next(iter(deltas), None))

    def _without_delta(self, x: Tensor, deltas: list[Delta]) -> Tensor | None:
        """None: what adapters do here cannot wait."""
        if self._branch is None or len(self._ops) != 1:
            return None
        (op,) = self._ops
        if not op.defers(x):
            return None
        deltas.append(self._branch.fork(partial(op.deferred, x), x.device))
        try:
            return self.product(x)
        finally:  # even where it raises: memory that the branch reads may go to others after this
            self._branch.join(x.device)


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


def slices_of(*modules: nn.Module | None) -> AdaptedLinear | None:
    """The linear whose slices these are: all of them, in this order. None: they are no such."""
    slices = [it for it in modules if isinstance(it, LinearSlice)]
    if len(slices) != len(modules) or len({it.fused for it in slices}) != 1:
        return None
    fused = slices[0].fused
    in_order = [it.index for it in slices] == list(range(len(fused.product.widths)))
    return fused if in_order else None


def deferred_of(linear: nn.Module, x: Tensor) -> Deferred:
    """Of a linear that may be ours."""
    return linear.deferred(x) if isinstance(linear, AdaptedLinear) else Deferred(linear(x))
