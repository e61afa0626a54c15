"""Routed experts over a stack with room for adapters' own."""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from kernels.expert_route import Routed, TokenBatch, expert_route
from kernels.grouped_gemm import Act, Activation, Layout, combine, down, gate_up, tile_rows
from server.model.families import Foreign, UnsupportedModelError
from server.model.inputs import CurrentStep
from server.model.routers import Router

_ACTS = {"SiLU": Act.SILU, "SiLUActivation": Act.SILU, "GELUTanh": Act.GELU_TANH, "PytorchGELUTanh": Act.GELU_TANH,
         "GELUActivation": Act.GELU}  # fmt: skip


@dataclass(frozen=True)
class Stacks:
    """`gate_up` [places, 2I, H] and `down` [places, H, I] begin with the base's M experts; behind them lie the places
    of adapters' (transposed where the family stores them so). expert_map [adapter slots + 1, M] int32 says which."""

    gate_up: Tensor
    down: Tensor
    expert_map: Tensor


class ExpertSpec(NamedTuple):
    """What adapters are checked against (adapters_store.base_spec.ExpertStack)."""

    num_experts: int
    hidden_size: int
    intermediate_size: int
    layout: Literal["gated", "other"]


class RoutedExperts(nn.Module):
    """Takes the place of a Transformers experts module: experts chosen from the router's logits, per adapter."""

    def __init__(self, original: Foreign, router: Router, stacks: Stacks, layer: int, step: CurrentStep) -> None:
        super().__init__()
        self._router, self.stacks, self._step = router, stacks, step
        self.gate_up_bias: Tensor | None = original.gate_up_proj_bias if original.has_bias else None
        self.down_bias: Tensor | None = original.down_proj_bias if original.has_bias else None
        self._layout = Layout(original.is_transposed, not original.is_concatenated)
        self._activation = _activation(original)
        is_gated = original.has_gate and original.is_concatenated and not (original.has_bias or original.is_transposed)
        num_experts, *matrix = original.down_proj.shape
        hidden, intermediate = reversed(matrix) if original.is_transposed else matrix
        self.spec = ExpertSpec(num_experts, hidden, intermediate, "gated" if is_gated else "other")
        self.layer = layer

    def forward(self, hidden: Tensor, logits: Tensor, _: Tensor) -> Tensor:
        """hidden [T, H]; logits [T, M] float32 (see Router) -> [T, H]."""
        stacks, routed = self.stacks, self.route(logits)
        gated = gate_up(hidden, stacks.gate_up, routed, self._activation, self._layout, self.gate_up_bias)
        return combine(down(gated, stacks.down, routed, self._layout, self.down_bias), routed)

    def route(self, logits: Tensor) -> Routed:
        """Which expert places the tokens of this step go to."""
        inputs, stacks, routing = self._step.inputs, self.stacks, self._router.routing
        slots = inputs.rows.slots if inputs.rows.shape.experts else None
        tokens = TokenBatch(slots, inputs.num_tokens, inputs.route_counters)
        rows = tile_rows(logits, routing.top_k, self.spec.num_experts)
        return expert_route(logits, routing, stacks.expert_map, len(stacks.gate_up), tokens, rows,
                            self._router.correction)  # fmt: skip


def layer_of(name: str) -> int:
    """model.layers.3.mlp.experts -> 3"""
    match = re.search(r"\.layers\.(\d+)\.", f".{name}")
    assert match is not None, name
    return int(match[1])


def _activation(experts: Foreign) -> Activation:
    if not experts.is_concatenated:  # gpt-oss
        return Activation(Act.CLAMPED, experts.alpha, experts.limit)
    name = type(experts.act_fn).__name__
    if name not in _ACTS:
        raise UnsupportedModelError(f"experts with the activation {name} are not served; these are: {', '.join(_ACTS)}")
    return Activation(_ACTS[name])
