"""The activations of Transformers' gated layers, told by what they compute."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.gated import Act, Activation
from kernels.gated.reference import gated
from server.model.families import Foreign, UnsupportedModelError
from server.model.likeness import Says, are_alike, numbers, outcome, stand_in

_WIDTH = 24  # of the rows of gate and up, side by side, that functions are tried with


def activation_of(experts: Foreign) -> Activation:
    """Of one of Transformers' modules of routed experts. Raises UnsupportedModelError for one that is not served."""
    found = same_as(experts._apply_gate, candidates(experts), not experts.is_concatenated)
    if found is None:
        shown = type(getattr(experts, "act_fn", experts)).__name__
        known = ", ".join(act.name for act in Act)
        raise UnsupportedModelError(f"experts with the activation {shown} are not served; these are: {known}")
    return found


def activation_of_layer(layer: Foreign) -> Activation | None:
    """Of a layer with gate_proj, up_proj and down_proj that computes down(act(gate(x)) * up(x)); None: it computes
    something else.

    Its forward is tried with stand-ins for the three, so that nothing is multiplied and all the rest is its own. Gate
    and up answer only for what the layer itself was given.
    """

    def forward(products: Tensor) -> Tensor:
        gate, up = products.chunk(2, dim=-1)
        parts = {
            "gate_proj": Says(lambda x: gate if x is products else None),
            "up_proj": Says(lambda x: up if x is products else None),
            "down_proj": Says(lambda x: x),
        }
        result: Tensor = type(layer).forward(stand_in(layer, parts), products)
        return result

    return same_as(forward, candidates(layer), is_interleaved=False)


def candidates(module: Foreign) -> Iterator[Activation]:
    """Those that it may have."""
    yield from (Activation(act) for act in (Act.SILU, Act.GELU_TANH, Act.GELU))
    alpha, limit = getattr(module, "alpha", None), getattr(module, "limit", None)
    if isinstance(alpha, float) and isinstance(limit, float):
        yield Activation(Act.CLAMPED, alpha, limit)


@torch.inference_mode()
def same_as(
    theirs: Callable[[Tensor], Tensor], candidates: Iterator[Activation], is_interleaved: bool
) -> Activation | None:
    """The one that does to rows of gate and up what this function does; None: it is none of these."""
    # far enough from nought for limits to show
    products = torch.cat([numbers(8, 2 * _WIDTH) * 4, numbers(8, 2 * _WIDTH, seed=1) * 50])
    result = outcome(theirs, products)
    return next((it for it in candidates if are_alike(result, gated(products, it, is_interleaved))), None)
