"""What of a family is computed by ours and what stays Transformers' own, read off a model that was injected."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from server.model.attention import BorrowingLayer, PagedLayer
from server.model.experts import RoutedExperts
from server.model.fused_attention import FusedAttention
from server.model.latent_attention import OwnLatentAttention
from server.model.masks import Visible
from server.model.mla import LatentLayer
from server.model.mlp import FusedGate
from server.model.norms import RmsNorm
from server.model.routers import OwnRouter
from server.model.sparse import Unindexed
from server.model.temperature import TunedLayer
from tests.support.engine_harness import Engine

OWN = "own"


@dataclass(frozen=True)
class Mechanisms:
    """In words, for the table; OWN is what stays as Transformers computes it."""

    attention: str
    rope: str
    norm: str
    gate: str
    router: str


def mechanisms_of(engine: Engine, model: nn.Module) -> Mechanisms:
    modules: list[Any] = list(model.modules())
    return Mechanisms(
        _joined(_attention(it.cached_layer) for it in modules if hasattr(it, "cached_layer")),
        _joined(_rope(it) for it in modules if hasattr(it, "cached_layer")),
        _joined(_norm(it) for it in modules if "Norm" in type(it).__name__),
        _joined("fused" if isinstance(it.__dict__.get("forward"), FusedGate) else OWN
                for it in modules if hasattr(it, "gate_proj") and hasattr(it, "down_proj")),
        _joined(_router(it) for it in modules if isinstance(it, RoutedExperts)),
    )  # fmt: skip


def _attention(layer: Any) -> str:
    if isinstance(layer, TunedLayer):
        return f"{_attention(layer.inner)}, queries by position"
    if isinstance(layer, BorrowingLayer):
        return "borrowed"
    if isinstance(layer, LatentLayer):
        return "latent"
    assert isinstance(layer, PagedLayer)
    it = layer.visible
    return "full" if it == Visible() else "window" if it.chunk is None else "chunk"


def _rope(attention: Any) -> str:
    """Ours by the name of the function that stands in for the family's."""
    forward: Any = attention.__dict__.get("forward")
    if isinstance(forward, FusedAttention):
        return "halves"
    forward = forward.inner if isinstance(forward, Unindexed | OwnLatentAttention) else forward
    names = {it.__name__ for name, it in forward.__globals__.items() if name.startswith("apply_rotary")
             and it.__module__ == "server.model.rope"} if hasattr(forward, "__globals__") else set()  # fmt: skip
    return _joined(name.removeprefix("_rope").removeprefix("_") or "halves" for name in names) or OWN


def _norm(norm: Any) -> str:
    if not isinstance(norm, RmsNorm):
        return OWN
    return "1 + weight" if norm.kind.offset else "rms"


def _router(experts: RoutedExperts) -> str:
    it = experts.router.routing
    if isinstance(experts.router, OwnRouter):
        return OWN
    words = [it.score.name.lower().replace("_", " ")]
    words += ["renormalised"] * it.renormalise + [f"x {it.scale:g}"] * (it.scale != 1)
    words += [f"best {it.top_groups} of {it.num_groups} groups"] * (it.num_groups > 1)
    words += ["correction"] * (experts.router.correction is not None)
    return ", ".join(words)


def _joined(words: Iterable[str]) -> str:
    return " / ".join(sorted(set(words)))
