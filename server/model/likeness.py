"""Whether something of Transformers computes what something of ours does: told by trying both.

A name says where to look, and no more: two families may call different things RMSNorm or apply_rotary_pos_emb. What is
not recognised stays Transformers' own, which is slower and as right.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger("heddle.likeness")


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
            ) -> Tensor:  # fmt: skip
    """Normally distributed, the same in every process; the generators of the process are left alone."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device, dtype)


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns; None where it cannot be called like this, in whatever way it says so."""
    try:
        return function(*arguments)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        log.debug("%s cannot be tried: %r", function, error)
        return None


def stand_in(module: nn.Module, parts: Mapping[str, nn.Module], **settings: Any) -> nn.Module:
    """Another of the module's class, to be tried: with its attributes and parts, but for these, and without parameters
    but for those among the settings."""
    it: nn.Module = type(module).__new__(type(module))
    it.__dict__.update({key: value for key, value in module.__dict__.items() if key not in ("_modules", "_parameters")})
    it._modules, it._parameters = {**module._modules, **parts}, {}
    it.__dict__.update(settings)
    return it


class Says(nn.Module):
    """Stands in for a part of a module: what it is given goes through a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def are_alike_rounded(theirs: Any, ours: Any) -> bool:
    """The same of two that were computed in bfloat16, in which both must be: a function may widen what it is given, and
    return it so, which float32 does not show."""
    if isinstance(theirs, tuple) and isinstance(ours, tuple):
        return len(theirs) == len(ours) and all(map(are_alike_rounded, theirs, ours))
    same_type = isinstance(theirs, Tensor) and isinstance(ours, Tensor) and theirs.dtype == ours.dtype
    return same_type and are_alike(theirs, ours, tolerance=2**-6)


def are_identical(theirs: Any, ours: Tensor) -> bool:
    return isinstance(theirs, Tensor) and theirs.dtype == ours.dtype and torch.equal(theirs, ours)


def are_alike(theirs: Any, ours: Any, tolerance: float = 1e-5) -> bool:
    """Whether two tensors, or two tuples of them, hold the same numbers but for float32's rounding.

    tolerance: of the difference, as a part of the row's largest number.
    """
    if isinstance(theirs, tuple) and isinstance(ours, tuple):
        return len(theirs) == len(ours) and all(map(are_alike, theirs, ours, [tolerance] * len(ours)))
    if not (isinstance(theirs, Tensor) and isinstance(ours, Tensor)) or theirs.shape != ours.shape:
        return False
    a, b = theirs.double(), ours.double()
    return bool(((a - b).abs().amax(-1) <= tolerance * a.abs().amax(-1)).all())
