"""Shared experts: a gated layer that every token takes beside the experts that it chooses.

Where its inner width is n times an expert's, it is n more experts, which are always chosen, with weight 1. Where
kernels compute, they lie behind the base's routed experts in the same stack, and cost no launch of their own. An
adapter may replace them like any other.

The layer itself stays, for steps with LoRA, which acts on its linears, for long prompts, and on a CPU, whose product of
two plain matrices is faster. There routing gives places to those shared experts only that an adapter has of its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gated import Activation
from server.model.activations import activation_of_layer
from server.model.families import Foreign
from server.model.likeness import Says, are_alike, are_alike_rounded, numbers, outcome, stand_in
from server.model.product import is_linear

LINEARS = ("gate_proj", "up_proj", "down_proj")
_TOKENS = 5  # that blocks are tried with


class FoundShared(NamedTuple):
    """A layer of shared experts, by its name within the block."""

    leaf: str
    num: int  # of experts that it is as wide as


class SharedExperts(NamedTuple):
    num: int
    layer: Callable[[Tensor], Tensor]  # [T, H] -> [T, H]: of the base, with LoRA
    are_in_stack: bool  # else only adapters' own are


@torch.inference_mode()
def shared_experts_of(
    block: Foreign, router: str, experts: str, width: int, activation: Activation
) -> FoundShared | None:
    """Of a block that computes experts(x) + shared(x) and no more, told by trying. None: it has none, or computes
    something else. router, experts: names of its parts; width: of an expert."""
    found = [
        FoundShared(leaf, layer.gate_proj.out_features // width)
        for leaf, layer in block.named_children()
        if _is_layer_of(layer, width) and activation_of_layer(layer) == activation
    ]
    if len(found) != 1:
        return None
    (shared,) = found
    is_sum = all(_is_sum(block, router, experts, shared.leaf, dtype) for dtype in (torch.float32, torch.bfloat16))
    return shared if is_sum else None


def _is_sum(block: Foreign, router: str, experts: str, leaf: str, dtype: torch.dtype) -> bool:
    """Whether the block adds up what its experts and the layer of this name return, and no more, in this type."""
    x = numbers(_TOKENS, block.get_submodule(leaf).gate_proj.in_features, dtype=dtype)
    weights, ids = numbers(_TOKENS, 2, seed=1), torch.arange(2 * _TOKENS).view(_TOKENS, 2)

    def cubes(hidden: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        return (hidden**3 * ((chosen == ids) * scores).sum(-1, keepdim=True)).to(hidden.dtype)

    parts = {
        router: Says(lambda *_: (weights, weights, ids)),
        experts: Says(cubes),
        leaf: Says(lambda it: it / 2),
    }
    handed = dict(block.named_parameters(recurse=False))  # to the router, by some
    theirs = outcome(type(block).forward, stand_in(block, parts, **handed), x[None])
    ours = (x**3 * weights.sum(-1, keepdim=True)).to(dtype) + x / 2
    return (are_alike if dtype is torch.float32 else are_alike_rounded)(theirs, ours[None])


def _is_layer_of(layer: Foreign, width: int) -> bool:
    """Whether it has gate, up and down without biases, as wide as some experts."""
    linears = [it for name in LINEARS if isinstance(it := getattr(layer, name, None), nn.Linear) and is_linear(it)]
    if len(linears) < len(LINEARS) or any(it.bias is not None for it in linears):
        return False
    gate, up, down = linears
    inner = gate.out_features
    return inner > 0 and inner % width == 0 and up.out_features == inner == down.in_features


def fill(gate_up: Tensor, down: Tensor, layer: Foreign) -> None:
    """Write the layer's weights to places of the stacks: gate_up [n, 2I, H], down [n, H, I]."""
    count, hidden, inner = down.shape
    for half, linear in zip(gate_up.split(inner, dim=1), (layer.gate_proj, layer.up_proj), strict=True):
        half.copy_(linear.weight.data.view(count, inner, hidden))
    down.copy_(layer.down_proj.weight.data.view(hidden, count, inner).transpose(0, 1))


class PlacedGateUp:
    """Implements Product: gate and up of n shared experts as those of one layer, out of their places [n, 2I, H]."""

    widths: tuple[int, ...]
    bias: Tensor | None = None

    def __init__(self, places: Tensor) -> None:
        self._places = places
        count, both, self.in_features = places.shape
        self._inner = both // 2
        self.widths = (count * self._inner,) * 2

    @property
    def dtype(self) -> torch.dtype:
        return self._places.dtype

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x, self._places.flatten(0, 1))  # gate and up of each
        return y.view(*x.shape[:-1], -1, 2, self._inner).transpose(-3, -2).flatten(-3)

    def rows(self, index: int) -> Tensor:
        return self._places.view(-1, 2, self._inner, self.in_features)[:, index].flatten(0, 1)


class PlacedDown:
    """Implements Product: the same of down, out of [n, H, I]."""

    widths: tuple[int, ...]
    bias: Tensor | None = None

    def __init__(self, places: Tensor) -> None:
        self._places = places
        count, hidden, inner = places.shape
        self.widths, self.in_features = (hidden,), count * inner

    @property
    def dtype(self) -> torch.dtype:
        return self._places.dtype

    def __call__(self, x: Tensor) -> Tensor:
        count, hidden, inner = self._places.shape
        first, *others = x.reshape(-1, count * inner).split(inner, dim=-1)
        y = F.linear(first, self._places[0])
        for its, place in zip(others, self._places[1:], strict=True):
            y.addmm_(its, place.t())
        return y.view(*x.shape[:-1], hidden)

    def rows(self, index: int) -> Tensor:
        return self._places.transpose(0, 1).flatten(1)
