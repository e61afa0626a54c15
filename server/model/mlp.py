"""Gated layers whose gate and up are one product: the activation reads it as it is, in one launch."""

from torch import Tensor, nn

from kernels.gated import Activation, gated
from server.model.families import Foreign
from server.model.linears import LinearSlice


class FusedGate:
    """Takes the place of a gated layer's forward. The layer keeps its linears, which adapters act on."""

    def __init__(self, layer: Foreign, activation: Activation) -> None:
        self._fused, self._down, self._activation = layer.gate_proj.fused, layer.down_proj, activation

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._down(gated(self._fused(x), self._activation))
        return out


def is_fused(layer: nn.Module) -> bool:
    """Whether gate and up are the two slices of one product, in this order."""
    gate, up = (getattr(layer, name, None) for name in ("gate_proj", "up_proj"))
    if not (isinstance(gate, LinearSlice) and isinstance(up, LinearSlice) and gate.fused is up.fused):
        return False
    return (gate.index, up.index) == (0, 1) and len(gate.fused.product.widths) == 2
