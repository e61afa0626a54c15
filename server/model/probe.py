"""What a model is, learnt by running one token through it as Transformers made it.

Configurations name sizes in too many ways, and do not say which linears read the same input or who sees whom.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.model.families import Foreign, UnsupportedModelError
from server.model.masks import UnknownMaskError, Visible, hand_on_masks, mask_of
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


class ProbedAttention(NamedTuple):
    """An attention module, what a token leaves in its cache, and what a token sees there. source: the earlier layer
    whose keys and values it takes, instead of any of its own."""

    module: nn.Module
    shape: KVShape
    visible: Visible
    source: int | None = None


@dataclass(frozen=True)
class Probed:
    """attention: in order of layer. siblings: names of linears, grouped by input."""

    attention: list[ProbedAttention]
    siblings: list[list[str]]


class _Call(NamedTuple):
    key: Tensor
    value: Tensor
    mask: Tensor | None

    @property
    def shape(self) -> KVShape:
        return KVShape(self.key.shape[1], self.key.shape[-1], self.value.shape[-1])

    def takes_over(self, other: "_Call") -> bool:
        return all(ours.data_ptr() == its.data_ptr() for ours, its in zip(self[:2], other[:2], strict=True))


@torch.inference_mode()
def probe(model: Foreign, length: int) -> Probed:
    """Run one token; the model is left as it was, but for which attention and experts it names: the caller sets those.

    length: of the longest sequence that is served. Raises UnsupportedModelError.
    """
    calls: dict[nn.Module, list[_Call]] = {}
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
    one = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    try:
        with attending(model, _recorder(calls)):
            model(input_ids=one, position_ids=one, attention_mask=one + 1, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    attention = _attention(model, calls, length)
    _check_window(model.config, attention, length)
    return Probed(attention, list(readers.values()))


def _check_window(config: Foreign, attention: Sequence[ProbedAttention], length: int) -> None:
    """Caches of Transformers take every setting for a window, and many forwards take none: what is right is unsaid."""
    window = getattr(config, "sliding_window", None)
    is_meant = window is not None and window < length and getattr(config, "use_sliding_window", True)
    if is_meant and not getattr(config, "layer_types", None) and all(it.visible == Visible() for it in attention):
        raise UnsupportedModelError(
            f"sliding_window = {window} has no effect in {config.model_type} models; remove it from config.json"
        )


@contextmanager
def attending(model: Foreign, attend: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """The model as Transformers made it, but for what is called for attention. Masks come as masks.py says, if the
    model is given one of all its tokens: without it, it takes positions that are not consecutive for other sequences'.
    """
    AttentionInterface.register(PROBE, attend)
    model.config._attn_implementation = PROBE
    model.config._experts_implementation = "eager"  # the only one of Transformers' that takes every shape
    try:
        yield
    finally:
        AttentionInterface.register(PROBE, _unasked)  # the registry is the process's, and would keep the model


def _attention(model: Foreign, calls: dict[nn.Module, list[_Call]], length: int) -> list[ProbedAttention]:
    layers: int = model.config.num_hidden_layers
    once = {module: its[0] for module, its in calls.items() if len(its) == 1}
    if len(calls) != layers or len(once) != layers:
        raise UnsupportedModelError(
            f"{model.config.model_type}: of {layers} layers {len(once)} call attention once; layers that mix tokens in "
            "another way are not served"
        )
    by_layer = sorted(once.items(), key=lambda item: _layer_index(item[0]))
    its = [call for _, call in by_layer]
    sources = [next((at for at in range(index) if call.takes_over(its[at])), None) for index, call in enumerate(its)]
    return [
        ProbedAttention(module, call.shape, _visible(model, module, call, length), source)
        for (module, call), source in zip(by_layer, sources, strict=True)
    ]


def _layer_index(attention: Foreign) -> int:
    return int(attention.layer_idx)


def _visible(model: Foreign, module: Foreign, call: _Call, length: int) -> Visible:
    try:
        return mask_of(call.mask).visible(length)
    except UnknownMaskError as error:
        raise UnsupportedModelError(
            f"{model.config.model_type}: attention of layer {module.layer_idx} is neither causal, of a sliding window "
            f"nor of chunks: {error}"
        ) from None


def _recorder(calls: dict[nn.Module, list[_Call]]) -> Callable[..., tuple[Tensor, None]]:
    def record(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
               *_: object, **__: object) -> tuple[Tensor, None]:  # fmt: skip
        """What a layer caches, and its mask; the values do not matter, but whose they are."""
        calls.setdefault(module, []).append(_Call(key, value, attention_mask))
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

    return record


def _unasked(*_: object, **__: object) -> tuple[Tensor, None]:
    raise AssertionError("the model was called before it was probed")


AttentionInterface.register(PROBE, _unasked)
hand_on_masks(PROBE)
