"""Gated layers whose gate and up are one product: the activation reads it as it is, in one launch."""

from torch import Tensor, nn

from kernels.gated import Activation, gated
from server.model.families import Foreign
from server.model.linears import Deferred, deferred_of, slices_of


class FusedGate:
    """Takes the place of a gated layer's forward. The layer keeps its linears, which adapters act on."""

    def __init__(self, layer: Foreign, activation: Activation) -> None:
        self._fused, self._down, self._activation = layer.gate_proj.fused, layer.down_proj, activation

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._down(self._activated(x))
        return out

    def deferred(self, x: Tensor) -> Deferred:
        return deferred_of(self._down, self._activated(x))

    def _activated(self, x: Tensor) -> Tensor:
        products, delta = self._fused.deferred(x)
        return gated(products, self._activation, delta=delta)


def is_fused(layer: nn.Module) -> bool:
    """Whether gate and up are the two slices of one product, in this order."""
    return slices_of(*(getattr(layer, name, None) for name in ("gate_proj", "up_proj"))) is not None
