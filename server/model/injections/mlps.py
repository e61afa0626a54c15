"""Gated layers, with one launch for their activation."""

from server.model.activations import known_activation
from server.model.build import Build, Injected
from server.model.families import Foreign
from server.model.mlp import FusedGate, is_fused

# those that compute down_proj(act_fn(gate_proj(x)) * up_proj(x)) and nothing else
_GATED = frozenset(f"{family}MLP" for family in (
    "DeepseekV2", "DeepseekV3", "Gemma2", "Llama", "Mistral", "Olmoe", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe",
))  # fmt: skip


def inject_mlps(build: Build, injected: Injected) -> None:
    """After the linears: gate and up must be one product by then."""
    layer: Foreign
    for layer in list(build.model.modules()):
        if type(layer).__name__ in _GATED and is_fused(layer):
            activation = known_activation(layer.act_fn)
            if activation is not None:
                layer.forward = FusedGate(layer, activation)
