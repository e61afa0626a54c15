"""Attention layers whose queries, keys and values are one product, normed by head or not, rotated, and attended with:
all between the product and attention in one launch.

Which layers these are is told by trying: a layer's own forward, between stand-ins for its linears and its cache.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels.rope_store import HeadNorms, Heads
from kernels.rope_store.reference import turned
from server.model.attention import PagedLayer
from server.model.families import Foreign
from server.model.likeness import Says, are_alike, are_alike_rounded, numbers, outcome, stand_in
from server.model.linears import AdaptedLinear, Deferred, deferred_of, slices_of
from server.model.norms import NormKind, RmsNorm

_TOKENS = 4
_LINEARS = ("q_proj", "k_proj", "v_proj")
_NORMS = ("q_norm", "k_norm")


class Told(NamedTuple):
    """What trying has shown of an attention layer. turns: the name of the argument with cosines and sines."""

    heads: Heads
    scale: float
    softcap: float | None
    has_sinks: bool
    turns: str


class FusedAttention:
    """Takes the place of an attention layer's forward. The layer keeps its linears, which adapters act on."""

    def __init__(
        self, attention: Foreign, fused: AdaptedLinear, told: Told, norms: tuple[RmsNorm, RmsNorm] | None
    ) -> None:
        self._attention, self._fused, self._told, self._norms = attention, fused, told, norms
        self._out: nn.Module = attention.o_proj
        self._layer: PagedLayer = attention.cached_layer

    def __call__(self, hidden_states: Tensor, **given: Any) -> tuple[Tensor, None]:
        return self._out(self._context(hidden_states, given)), None

    def deferred(self, x: Tensor, **given: Any) -> Deferred:
        return deferred_of(self._out, self._context(x, given))

    def _context(self, x: Tensor, given: Mapping[str, Any]) -> Tensor:
        """[1, T, query heads * value_dim]"""
        it = self._told
        product, delta = self._fused.deferred(x)
        norms = None
        if self._norms is not None:
            query, key = self._norms
            norms = HeadNorms(query.weight, key.weight, *query.kind)
        sinks = self._attention.sinks if it.has_sinks else None
        out = self._layer.turn_and_attend(product[0], it.heads, given[it.turns], norms, delta, it.scale, it.softcap,
                                          sinks)  # fmt: skip
        return out.view(1, len(out), -1)


class _Noting:
    """Stands in for the cache of a layer, and keeps what it is asked."""

    def __init__(self, context: Tensor) -> None:
        self._context = context
        self.asked: tuple[Any, ...] = ()

    def attend(self, *asked: Any) -> Tensor:
        self.asked = asked
        return self._context


@torch.inference_mode()
def fuse_attention(attention: Foreign, given: Mapping[str, Any]) -> None:
    """Give this module a forward of ours, if its own computes the same. given: what it is called with."""
    fused = slices_of(*(getattr(attention, name, None) for name in _LINEARS))
    layer, found = attention.cached_layer, [getattr(attention, name, None) for name in _NORMS]
    if fused is None or len(fused.product.widths) != 3 or type(layer) is not PagedLayer:
        return
    norms = None
    if found != [None, None]:
        query, key = found
        if not isinstance(query, RmsNorm) or not isinstance(key, RmsNorm) or query.kind != key.kind:
            return
        norms = query, key
    if (told := _told(attention, fused, layer, given, norms and norms[0].kind)) is not None:
        attention.forward = FusedAttention(attention, fused, told, norms)


def _told(
    attention: Foreign, fused: AdaptedLinear, layer: PagedLayer, given: Mapping[str, Any], kind: NormKind | None
) -> Told | None:
    shape, width = layer.shape, fused.product.widths[0]
    turns = [name for name, it in given.items() if isinstance(it, tuple) and len(it) == 2]
    cosines = given[turns[0]][0] if len(turns) == 1 else None
    if not isinstance(cosines, Tensor) or cosines.dim() != 3 or width % shape.key_dim:
        return None
    columns = cosines.shape[-1]
    for rotated, is_doubled in ((columns, True), (2 * columns, False)):
        heads = Heads(width // shape.key_dim, shape.kv_heads, shape.key_dim, shape.value_dim, rotated)
        if rotated % 2 == 0 and rotated <= heads.dim and heads.widths == fused.product.widths:
            tried = partial(_try, attention, heads, turns[0], is_doubled, given, kind)
            told = tried(torch.float32)
            if told is not None and told == tried(torch.bfloat16):
                return told
    return None


def _try(
    attention: Foreign, heads: Heads, turns: str, is_doubled: bool, given: Mapping[str, Any], kind: NormKind | None,
    dtype: torch.dtype,
) -> Told | None:  # fmt: skip
    """Both are given the same numbers in the place of the product, of the cosines and of what attention returns.

    The product is there only for the very input, and norms do not norm, which would take out a factor in front of them.
    """
    drawn = partial(numbers, dtype=dtype)
    x, product = drawn(1, _TOKENS, 8, seed=5), drawn(1, _TOKENS, sum(heads.widths))
    product[:, 0] *= 1000  # for limits to show
    angles = numbers(1, _TOKENS, heads.rotated // 2, seed=1)
    angles = torch.cat([angles, angles], -1) if is_doubled else angles
    cos_sin = angles.cos().to(dtype), angles.sin().to(dtype)
    context = drawn(_TOKENS, heads.query, heads.value_dim, seed=2)
    noting, sinks = _Noting(context), drawn(heads.query, seed=3)
    slices = zip(_LINEARS, product.split(heads.widths, -1), strict=True)
    parts: dict[str, nn.Module] = {
        name: Says(lambda it, part=part: part.clone() if it is x else None) for name, part in slices
    }
    parts["o_proj"] = Says(lambda x: x)
    norms = None
    if kind is not None:
        weights = 1 + drawn(2, heads.dim, seed=4) / 4
        norms = HeadNorms(weights[0], weights[1], *kind)
        parts |= {name: Says(partial(_stand_in_norm, weight=it)) for name, it in zip(_NORMS, weights, strict=True)}
    tried = stand_in(attention, parts, cached_layer=noting, sinks=sinks)
    arguments = {**given, turns: cos_sin}
    result = outcome(lambda: type(attention).forward(tried, x, **arguments))
    if not (isinstance(result, tuple) and len(result) == 2 and noting.asked):
        return None
    query, key, value, scale, softcap, its_sinks = noting.asked
    expected = *turned(product[0], heads, *cos_sin, norms, _stand_in_norm), context.flatten(1)[None]
    compare = are_alike if dtype is torch.float32 else are_alike_rounded
    alike = compare((query, key, value, result[0]), expected)
    if not alike or not isinstance(scale, float) or not (its_sinks is None or its_sinks is sinks):
        return None
    return Told(heads, scale, softcap, its_sinks is sinks, turns)


def _stand_in_norm(heads: Tensor, weight: Tensor, *_: object) -> Tensor:
    return (0.5 - heads) * weight
