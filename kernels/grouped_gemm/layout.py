"""How expert weights lie in memory, and what is done between the two products."""

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """A stack [places, out, in], a matrix for each expert place, or [places, in, out] if transposed.

    interleaved: gate and up alternate among the columns of gate_up, instead of all gates before all ups (gpt-oss).
    """

    transposed: bool = False
    interleaved: bool = False


class Act(IntEnum):
    SILU = 0
    GELU_TANH = 1
    GELU = 2
    CLAMPED = 3  # gpt-oss: gate and up are clamped, (up + 1) * gate * sigmoid(alpha * gate)


@dataclass(frozen=True)
class Activation:
    """gate, up -> act(gate) * up. alpha and limit are those of the clamped form."""

    act: Act = Act.SILU
    alpha: float = 1.0
    limit: float = 0.0


def split_gate_up(gate_up: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """[.., 2I] -> gate and up, [.., I] each."""
    if interleaved:
        return gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate_up.chunk(2, dim=-1)
    return gate, up
