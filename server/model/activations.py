"""The activations of Transformers' gated layers, by their modules."""

from torch import nn

from kernels.gated import Act, Activation
from server.model.families import Foreign, UnsupportedModelError

_ACTS = {"SiLU": Act.SILU, "SiLUActivation": Act.SILU, "GELUTanh": Act.GELU_TANH, "PytorchGELUTanh": Act.GELU_TANH,
         "GELUActivation": Act.GELU}  # fmt: skip


def activation_of(experts: Foreign) -> Activation:
    """Of one of Transformers' modules of routed experts. Raises UnsupportedModelError for one that is not served."""
    if not experts.is_concatenated:  # gpt-oss
        return Activation(Act.CLAMPED, experts.alpha, experts.limit)
    known = known_activation(experts.act_fn)
    if known is None:
        raise UnsupportedModelError(
            f"experts with the activation {type(experts.act_fn).__name__} are not served; these are: {', '.join(_ACTS)}"
        )
    return known


def known_activation(function: nn.Module) -> Activation | None:
    """None: it is none of ours."""
    act = _ACTS.get(type(function).__name__)
    return None if act is None else Activation(act)
