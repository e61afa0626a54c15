"""Norms in one launch each, in place of the several that Transformers' take."""

import copy
import inspect
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rms_norm.reference import rms_norm as reference
from server.model.families import Foreign
from server.model.likeness import are_alike, numbers, outcome
from server.model.linears import Deferred

_EPSILONS = ("variance_epsilon", "eps", "norm_eps")


class NormKind(NamedTuple):
    """What families' norms differ in (kernels/rms_norm/reference.py)."""

    eps: float
    offset: float
    cast_first: bool


class RmsNorm(nn.Module):
    """Takes the place of a family's norm, with its rounding."""

    def __init__(self, weight: Tensor, kind: NormKind) -> None:
        super().__init__()
        self.weight, self.kind = weight, kind

    @classmethod
    def in_place_of(cls, original: Foreign) -> Self | None:
        """None: it computes something else, or its weight is not one vector."""
        kind = _kind_of(original)
        return None if kind is None else cls(original.weight, kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x)

    def of(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, *self.kind)

    def of_sum(self, added: Deferred, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(residual and what is added to it, normed; that sum itself)."""
        return add_rms_norm(added.y, residual, self.weight, *self.kind, delta=added.delta)


@torch.inference_mode()
def _kind_of(norm: Foreign) -> NormKind | None:
    """Its formula is told in float32, and the order of its roundings in its own type."""
    weight = getattr(norm, "weight", None)
    eps = next((getattr(norm, name) for name in _EPSILONS if hasattr(norm, name)), None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if len(inspect.signature(norm.forward).parameters) != 1:  # a gate, say
        return None
    wide = copy.deepcopy(norm).float()
    x = numbers(4, len(weight), device=weight.device)
    x[1] *= eps**0.5  # so small that eps counts
    x[2] += 1  # so that a norm that takes the mean off shows
    x[3] *= 100  # and one with a limit
    theirs, narrow = outcome(wide, x), x.to(weight.dtype)
    offset = next((it for it in (0.0, 1.0) if are_alike(theirs, reference(x, wide.weight, eps, it))), None)
    if offset is None:
        return None
    kinds = NormKind(eps, offset, True), NormKind(eps, offset, False)
    rounded = outcome(norm, narrow)
    same = [it for it in kinds if isinstance(rounded, Tensor) and torch.equal(rounded, reference(narrow, weight, *it))]
    return next(iter(same), kinds[0])
