"""What lies between the two products of a gated layer."""

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class Act(IntEnum):
    """The function of the gate."""

    SILU = 0
    GELU_TANH = 1  # GELU in its approximation by tanh
    GELU = 2
    # gpt-oss: gate is clamped to at most limit, up to between -limit and limit; (up + 1) * gate * sigmoid(alpha * gate)
    CLAMPED = 3


@dataclass(frozen=True)
class Activation:
    """gate, up -> act(gate) * up. alpha and limit matter to CLAMPED only."""

    act: Act = Act.SILU
    alpha: float = 1.0
    limit: float = 0.0


def split_gate_up(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """[.., 2I] -> gate and up, [.., I] each."""
    if interleaved:
        return gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up
