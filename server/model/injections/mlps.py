"""Gated layers, with one launch for their activation."""

from server.model.activations import activation_of_layer
from server.model.build import Build, Injected
from server.model.families import Foreign
from server.model.mlp import FusedGate, is_fused


def inject_mlps(build: Build, injected: Injected) -> None:
    """After the linears: gate and up must be one product by then."""
    layer: Foreign
    for layer in list(build.model.modules()):
        if is_fused(layer) and (activation := activation_of_layer(layer)) is not None:
            layer.forward = FusedGate(layer, activation)
