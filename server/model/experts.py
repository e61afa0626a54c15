"""Routed experts over a stack with room for adapters' own."""

from torch import Tensor, nn

from kernels.expert_route import expert_route
from kernels.grouped_gemm import combine, grouped_gemm
from server.model.inputs import CurrentStep


class RoutedExperts(nn.Module):
    """Takes the place of a Transformers experts module: same forward, experts chosen per adapter.

    `gate_up` [slots, 2I, H] and `down` [slots, H, I] begin with the base's M experts; behind them lie the slots of
    adapters (transposed where the family stores them so). The activation stays the family's own.
    """

    def __init__(self, original: nn.Module, gate_up: Tensor, down: Tensor, layer: int, step: CurrentStep) -> None:
        super().__init__()
        self._gate_up, self._down = gate_up, down
        self._gate_up_bias = original.gate_up_proj_bias if original.has_bias else None
        self._down_bias = original.down_proj_bias if original.has_bias else None
        self._transposed: bool = original.is_transposed
        is_gated = original.has_gate and original.is_concatenated and not (original.has_bias or original.is_transposed)
        # what adapters are checked against: experts, hidden size, intermediate size, layout
        num_experts, *matrix = original.down_proj.shape
        hidden, intermediate = reversed(matrix) if original.is_transposed else matrix
        self.spec = (num_experts, hidden, intermediate, "gated" if is_gated else "other")
        self.layer = layer
        original.gate_up_proj = original.down_proj = None  # the stacks hold them now
        self._apply_gate = original._apply_gate
        self._step = step

    def forward(self, hidden: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, H]; expert_ids [T, K] among the base's experts; weights [T, K] -> [T, H]."""
        inputs = self._step.inputs
        buckets = expert_route(expert_ids, inputs.token_slots, inputs.tables.expert_map(self.layer))
        rows = hidden[buckets.pairs // expert_ids.shape[1]]
        gated = self._apply_gate(grouped_gemm(rows, self._gate_up, buckets, self._gate_up_bias, self._transposed))
        return combine(grouped_gemm(gated, self._down, buckets, self._down_bias, self._transposed), buckets, weights)
