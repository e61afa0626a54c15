"""Routed experts over a stack with room for adapters' own."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kernels.expert_route import Routed, TokenBatch, expert_route
from kernels.grouped_gemm import Activation, Layout, activate, combine, down, gate_up, tile_rows
from server.model.activations import activation_of
from server.model.families import Foreign
from server.model.inputs import CurrentStep
from server.model.routers import OwnRouter, Router


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
    name: str
    transposed: bool
    interleaved: bool
    biased: bool

    @property
    def layer(self) -> int:
        """model.layers.3.mlp.experts -> 3"""
        match = re.search(r"\.(?:layers|blocks|h)\.(\d+)\.", f".{self.name}")
        assert match is not None, self.name
        return int(match[1])


class FoundExperts(NamedTuple):
    """What a family's experts are, before ours take their place. take: their matrices, in the spec's layout, which the
    family's own module has no more afterwards."""

    spec: ExpertSpec
    activation: Activation
    dtype: torch.dtype
    take: Callable[[], tuple[Tensor, Tensor]]
    biases: tuple[Tensor | None, Tensor | None] = (None, None)


class ExpertFinish(Protocol):
    """What adapters of one kind do in the experts of a layer, for the step that is being computed."""

    def gate_up(self, products: Tensor, x: Tensor) -> None:
        """Changes products [P, 2I], by position: gate and up before the activation. x [T, H], by token.

        products: float32 where kernels compute, whatever x is; see kernels/grouped_gemm/reference.py.
        """

    def down(self, rows: Tensor, h: Tensor) -> None:
        """Changes rows [P, H], by pair number: before they are weighted and summed. h [P, I], by position."""


class ExpertOp(Protocol):
    """What one kind of part does beside the base's experts, rather than in place of them."""

    def begin(self, routed: Routed) -> ExpertFinish | None:
        """None: no adapter of the step that is being computed acts here."""


class RoutedExperts(nn.Module):
    """Takes the place of a Transformers experts module: experts chosen from the router's logits, per adapter."""

    def __init__(
        self, found: FoundExperts, router: Router | OwnRouter, stacks: Stacks, ops: Sequence[ExpertOp],
        step: CurrentStep,
    ) -> None:  # fmt: skip
        super().__init__()
        self.spec, self.stacks = found.spec, stacks
        self.router, self._ops, self._step = router, tuple(ops), step
        self.gate_up_bias, self.down_bias = found.biases
        self._layout = Layout(self.spec.transposed, self.spec.interleaved)
        self.activation = found.activation

    @property
    def choices(self) -> int:
        """How many experts a token takes."""
        return self.router.routing.top_k

    def forward(self, hidden: Tensor, logits: Tensor, _: Tensor) -> Tensor:
        """hidden [T, H]; logits [T, M] float32 (see Router and OwnRouter) -> [T, H]."""
        stacks, routed = self.stacks, self.route(logits)
        begun = [finish for op in self._ops if (finish := op.begin(routed)) is not None]
        # what adapters add to gate and up comes before the activation, which then is a launch of its own
        activation = None if begun else self.activation
        gated = gate_up(hidden, stacks.gate_up, routed, activation, self._layout, self.gate_up_bias)
        if begun:
            for finish in begun:
                finish.gate_up(gated, hidden)
            gated = activate(gated, self.activation, self._layout.interleaved, routed, hidden.dtype)
        rows = down(gated, stacks.down, routed, self._layout, self.down_bias)
        for finish in begun:
            finish.down(rows, gated)
        return combine(rows, routed)

    def route(self, logits: Tensor) -> Routed:
        """Which expert places the tokens of this step go to."""
        inputs, stacks, routing = self._step.inputs, self.stacks, self.router.routing
        slots = inputs.rows.slots if inputs.rows.shape.experts else None
        tokens = TokenBatch(slots, inputs.num_tokens, inputs.route_counters)
        rows = tile_rows(logits, routing.top_k, self.spec.num_experts)
        return expert_route(logits, routing, stacks.expert_map, len(stacks.gate_up), tokens, rows,
                            self.router.correction)  # fmt: skip


def experts_of(name: str, module: Foreign) -> FoundExperts | None:
    """Of one of Transformers' modules that hold all experts of a layer in two tensors, gate and up in one. None: it is
    none."""
    if not (hasattr(module, "gate_up_proj") and hasattr(module, "_apply_gate") and module.has_gate):
        return None
    if getattr(module, "has_post_expert_norm", False):
        return None
    num_experts, *matrix = module.down_proj.shape
    hidden, intermediate = reversed(matrix) if module.is_transposed else matrix
    spec = ExpertSpec(num_experts, hidden, intermediate, name, module.is_transposed, not module.is_concatenated,
                      module.has_bias)  # fmt: skip
    biases = (module.gate_up_proj_bias, module.down_proj_bias) if module.has_bias else (None, None)
    return FoundExperts(spec, activation_of(module), module.down_proj.dtype, lambda: take_matrices(module), biases)


def take_matrices(module: Foreign) -> tuple[Tensor, Tensor]:
    """Those of a module that holds them in two tensors, which it has no more afterwards."""
    matrices = module.gate_up_proj.data, module.down_proj.data
    module.gate_up_proj = module.down_proj = None
    return matrices
