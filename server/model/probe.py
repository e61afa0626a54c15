"""What a model is, learnt by running one token through it as Transformers made it.

Configurations name sizes in too many ways, and do not say which linears read the same input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.model.families import Foreign
from server.model.product import is_linear

PROBE = "heddle_probe"


@dataclass(frozen=True)
class KVShape:
    """Keys [kv_heads, key_dim] and values [kv_heads, value_dim] of one token in one layer."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class Probed:
    """attention: modules in order of layer, with what each caches. siblings: names of linears, grouped by input."""

    attention: list[tuple[nn.Module, KVShape]]
    siblings: list[list[str]]


@torch.inference_mode()
def probe(model: Foreign) -> Probed:
    """Run one token; the model is left as it was, but for its attention, which the caller sets anew."""
    shapes: dict[nn.Module, KVShape] = {}
    readers: dict[tuple[str, int], list[str]] = {}
    kept: list[Tensor] = []  # inputs stay alive, so that no two have one id

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor]) -> None:
            kept.append(arguments[0])
            readers.setdefault((name.rpartition(".")[0], id(arguments[0])), []).append(name)

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name)) for name, module in model.named_modules() if is_linear(module)
    ]
    AttentionInterface.register(PROBE, _recorder(shapes))
    model.config._attn_implementation = PROBE
    model.config._experts_implementation = "eager"  # the only one of Transformers' that takes every shape
    one = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        model(input_ids=one, position_ids=one, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
        AttentionInterface.register(PROBE, _unasked)  # the registry is the process's, and would keep the model
    attention = sorted(shapes.items(), key=lambda item: _layer_index(item[0]))
    return Probed(attention, list(readers.values()))


def _layer_index(attention: Foreign) -> int:
    return int(attention.layer_idx)


def _recorder(shapes: dict[nn.Module, KVShape]) -> Callable[..., tuple[Tensor, None]]:
    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
               ) -> tuple[Tensor, None]:  # fmt: skip
        """The shapes that a layer caches; the values do not matter."""
        shapes[module] = KVShape(key.shape[1], key.shape[-1], value.shape[-1])
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

    return record


def _unasked(*_: object, **__: object) -> tuple[Tensor, None]:
    raise AssertionError("the model was called before it was probed")


AttentionInterface.register(PROBE, _unasked)
