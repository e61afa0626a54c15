"""Engines that compute one thing otherwise than the model does, for checks that must find it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import server.assembly as assembly
from kernels.expert_route import Score
from kernels.rope import rope
from kernels.rope_store.reference import turned
from server.model.attention import PagedLayer
from server.model.experts import RoutedExperts
from server.model.fused_attention import FusedAttention
from server.model.masks import Visible
from server.model.norms import RmsNorm
from server.model.routers import Router

Spoil = Callable[[nn.Module], None]  # of a model that ours have been put into


class Wrong(NamedTuple):
    """What is wrong, in which tiny model (tiny_models.py), and the settings of model and engine that it takes."""

    what: str
    model: str
    spoil: Spoil
    model_settings: dict[str, Any] = {}
    engine_settings: dict[str, Any] = {}


@contextmanager
def spoiled(spoil: Spoil) -> Iterator[None]:
    """Engines that are made in this context are wrong."""
    inject = assembly.inject

    def inject_and_spoil(build: Any) -> Any:
        injected = inject(build)
        with torch.no_grad():
            spoil(build.model)
        return injected

    assembly.inject = inject_and_spoil
    try:
        yield
    finally:
        assembly.inject = inject


def _each(kind: type, change: Callable[[Any], None]) -> Spoil:
    def spoil(model: nn.Module) -> None:
        found = [module for module in model.modules() if isinstance(module, kind)]
        assert found, kind
        for module in found:
            change(module)

    return spoil


def _each_attention(change: Callable[[Any], None]) -> Spoil:
    def spoil(model: nn.Module) -> None:
        found = [module for module in model.modules() if hasattr(module, "cached_layer")]
        assert found
        for module in found:
            change(module)

    return spoil


def _visible(change: Callable[[Visible], Visible]) -> Spoil:
    def spoil(attention: Any) -> None:
        layer: PagedLayer = attention.cached_layer
        layer.visible = change(layer.visible)

    return _each_attention(spoil)


def attention_sees(visible: Visible) -> Spoil:
    """In every layer."""
    return _visible(lambda _: visible)


def _turn_otherwise(attention: Any, turn: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    """turn: (qkv, heads, cosines and sines, norms) -> query, key, value."""
    layer: Any = attention.cached_layer

    def otherwise(qkv: Tensor, heads: Any, turns: Any, norms: Any, delta: None, *settings: Any) -> Tensor:
        out: Tensor = layer.attend(*turn(qkv, heads, turns, norms), *settings)
        return out

    layer.turn_and_attend = otherwise


def _rope(name: str, function: Callable[..., tuple[Tensor, Tensor]]) -> Spoil:
    def spoil(attention: Any) -> None:
        if isinstance(attention.forward, FusedAttention):
            _turn_otherwise(
                attention, lambda qkv, heads, turns, norms: turned(qkv, heads, *turns, norms, rope=function)
            )
            return
        forward = attention.forward  # that of latent attention is within ours, and computes on the host
        its = getattr(forward, "inner", forward).__func__.__globals__
        assert name in its
        its[name] = function

    return _each_attention(spoil)


def _interleaved(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope(query, key, cos, sin, interleaved=True)


def _half(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Every second pair is not turned."""
    cos, sin = cos.clone(), sin.clone()
    cos[..., 1::2], sin[..., 1::2] = 1, 0
    return rope(query, key, cos, sin)


def _frequencies(change: Callable[[Tensor], Tensor]) -> Spoil:
    def spoil(model: nn.Module) -> None:
        (module,) = (it for it in model.modules() if hasattr(it, "inv_freq"))
        module.inv_freq.copy_(change(module.inv_freq))

    return spoil


def _theta(theta: float) -> Callable[[Tensor], Tensor]:
    return lambda it: theta ** -(torch.arange(len(it)) / len(it))


def _otherwise(attend: Callable[..., Tensor], changes: dict[str, Callable[[Any], Any]]) -> Callable[..., Tensor]:
    def otherwise(*given: Any) -> Tensor:
        named = dict(zip(("scale", "softcap", "sinks"), given[-3:], strict=True))
        return attend(*given[:-3], **{k: changes.get(k, lambda it: it)(v) for k, v in named.items()})

    return otherwise


def _call(**changes: Callable[[Any], Any]) -> Spoil:
    """What attention is called with: scale, softcap, sinks."""

    def spoil(attention: Any) -> None:
        layer = attention.cached_layer
        for name in ("attend", "turn_and_attend"):
            if hasattr(layer, name):
                setattr(layer, name, _otherwise(getattr(layer, name), changes))

    return _each_attention(spoil)


def _no_query_norm(attention: Any) -> None:
    assert isinstance(attention.forward, FusedAttention)

    def turn(qkv: Tensor, heads: Any, turns: Any, norms: Any) -> tuple[Tensor, Tensor, Tensor]:
        return turned(qkv, heads, *turns, None)[0], *turned(qkv, heads, *turns, norms)[1:]

    _turn_otherwise(attention, turn)


def _no_offset(norm: Any) -> None:
    norm.kind = norm.kind._replace(offset=0.0)


def _epsilon(norm: Any) -> None:
    norm.kind = norm.kind._replace(eps=1e-3)


def _routing(**changes: Any) -> Spoil:
    def spoil(router: Router) -> None:
        spoilt = replace(router.routing, **changes)
        assert spoilt != router.routing
        router.routing = spoilt

    return _each(Router, spoil)


def _no_correction(router: Router) -> None:
    assert router.correction is not None
    router.correction.zero_()


def _swapped(experts: RoutedExperts) -> None:
    base = experts.stacks.gate_up[: experts.spec.num_experts]
    base.copy_(torch.cat(list(reversed(base.chunk(2, dim=1))), dim=1))


_LONGER = {"sliding_window": 64}

WRONG = (
    Wrong("rope of other pairs", "llama", _rope("apply_rotary_pos_emb", _interleaved)),
    Wrong("rope of other pairs", "deepseek_v3", _rope("apply_rotary_pos_emb_interleave", rope)),
    Wrong("half of the rope", "llama", _rope("apply_rotary_pos_emb", _half)),
    Wrong("theta twice as high", "llama", _frequencies(_theta(2e4))),
    Wrong("theta a tenth higher", "llama", _frequencies(_theta(1.1e4))),
    Wrong("rope without its scaling", "llama-rope3", _frequencies(_theta(1e4))),
    Wrong("short rope beyond its length", "phi3-longrope", _frequencies(lambda it: it * 4), {}, {"max_model_len": 128}),
    Wrong("a window that is shorter by one", "mistral-window", attention_sees(Visible(6))),
    Wrong("a window that is longer by one", "mistral-window", attention_sees(Visible(8))),
    Wrong("a window ignored", "mistral-window", attention_sees(Visible())),
    Wrong("chunks for a window", "mistral-window", attention_sees(Visible(None, 7))),
    Wrong("a longer window ignored", "mistral-window", attention_sees(Visible()), _LONGER),
    Wrong("twice a longer window", "mistral-window", attention_sees(Visible(128)), _LONGER),
    Wrong("windows in the other layers", "gemma2", _visible(lambda it: Visible(None if it.window else 7))),
    Wrong("a norm without its offset", "gemma2", _each(RmsNorm, _no_offset)),
    Wrong("no soft cap", "gemma2", _call(softcap=lambda it: None)),
    Wrong("another scale", "llama", _call(scale=lambda it: it * 1.1)),
    Wrong("no sinks", "gpt_oss", _call(sinks=lambda it: None)),
    Wrong("queries that are not normed", "qwen3", _each_attention(_no_query_norm)),
    Wrong("weights that are not renormalised", "mixtral-window", _routing(score=Score.SOFTMAX)),
    Wrong("weights that are renormalised", "qwen3_moe", _routing(renormalise=True)),
    Wrong("no correction of the router", "deepseek_v3", _each(Router, _no_correction)),
    Wrong("no groups of experts", "deepseek_v3", _routing(num_groups=1, top_groups=1)),
    Wrong("another factor of the router", "deepseek_v2-grouped", _routing(scale=1.0)),
    Wrong("gate and up the other way round", "olmoe", _each(RoutedExperts, _swapped)),
)

# which bfloat16's own rounding hides
WRONG_IN_FLOAT32 = (
    *WRONG,
    Wrong("another epsilon", "gemma2", _each(RmsNorm, _epsilon)),
    Wrong("a longer window that is shorter by one", "mistral-window", attention_sees(Visible(63)), _LONGER),
)
