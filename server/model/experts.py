"""Routed experts over a stack with room for adapters' own."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kernels.adapter_rows import FEW_ROWS
from kernels.expert_route import NO_SHARED, Routed, Shared, TokenBatch, expert_route, expert_route_of
from kernels.grouped_gemm import Activation, Layout, activate, combine, down, gate_up, tile_rows
from server.model.activations import activation_of
from server.model.families import Foreign
from server.model.inputs import CurrentStep
from server.model.routers import OwnRouter, Router
from server.model.shared_experts import SharedExperts


@dataclass(frozen=True)
class Stacks:
    """`gate_up` [places, 2I, H] and `down` [places, H, I] begin with the base's M experts (transposed where the family
    stores them so); behind them lie the places of its shared experts, and then those of adapters'. expert_map [adapter
    slots + 1, M + shared] int32 says which."""

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
    num_shared: int = 0

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
    """Takes the place of a Transformers experts module: experts chosen from the router's logits, per adapter; and of
    what the block would add to them."""

    def __init__(
        self, found: FoundExperts, router: Router | OwnRouter, stacks: Stacks, ops: Sequence[ExpertOp],
        step: CurrentStep, shared: SharedExperts | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.spec, self.stacks, self.shared = found.spec, stacks, shared
        self.asks_shared_layer = False  # in every step, whatever its adapters
        self.router, self._ops, self._step = router, tuple(ops), step
        self.gate_up_bias, self.down_bias = found.biases
        self._layout = Layout(self.spec.transposed, self.spec.interleaved)
        self.activation = found.activation

    @property
    def choices(self) -> int:
        """How many experts a token takes."""
        return self.router.routing.top_k + self.spec.num_shared

    def forward(self, hidden: Tensor, handed: Tensor, _: Tensor) -> Tensor:
        """hidden [T, H]; handed: what the router hands on, in the place of ids (see Router and OwnRouter) -> [T, H]."""
        stacks, placed = self.stacks, self._placed(len(hidden))
        routed = self.route(handed, placed)
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
        beside = None
        if self.shared is not None and (placed.only_own or not placed.num):
            beside = self.shared.layer(hidden)
        return combine(rows, routed, beside, placed.only_own)  # an adapter's own shared experts come all together

    def route(self, handed: Tensor, shared: Shared = NO_SHARED) -> Routed:
        """Which expert places the tokens of this step go to. shared: which shared experts are among the choices."""
        inputs, stacks, router = self._step.inputs, self.stacks, self.router
        slots = inputs.rows.slots if inputs.rows.shape.experts else None
        tokens = TokenBatch(slots, inputs.num_tokens, inputs.route_counters, shared)
        rows = tile_rows(handed, router.routing.top_k + shared.num, self.spec.num_experts + shared.num)
        rest = router.routing, stacks.expert_map, len(stacks.gate_up), tokens, rows, router.correction
        if isinstance(router, Router) and router.hands_its_input_on(handed):
            return expert_route_of(handed, router.linear(handed.dtype), *rest)
        return expert_route(handed, *rest)

    def _placed(self, tokens: int) -> Shared:
        """Which shared experts are computed among the others in this step; the layer computes the rest."""
        if self.shared is None:
            return NO_SHARED
        num, shape = self.shared.num, self._step.inputs.rows.shape
        if self.shared.are_in_stack and not shape.rank and tokens <= FEW_ROWS and not self.asks_shared_layer:
            return Shared(num)
        return Shared(num, only_own=True) if shape.experts else NO_SHARED


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
