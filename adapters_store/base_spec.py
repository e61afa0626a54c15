"""What an adapter is checked against: the shapes of the base model, without the model.

The engine process reads the spec off the loaded model; the front process receives it as a message.
"""

from typing import Literal

import msgspec


class ExpertStack(msgspec.Struct, frozen=True):
    """The routed experts of one MoE layer.

    `layout` is "gated" where one expert is gate [I, H], up [I, H] and down [H, I] without biases, the only form that
    ESFT adapters exist for. Other layouts ("other") are served for the base, not replaced by adapters.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    layout: Literal["gated", "other"]


class BaseSpec(msgspec.Struct, frozen=True):
    """Linears by module name as (out_features, in_features), and expert stacks by layer index."""

    model_type: str
    linears: dict[str, tuple[int, int]]
    experts: dict[int, ExpertStack]
