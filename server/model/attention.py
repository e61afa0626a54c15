"""Our attention inside Transformers' models.

A model calls the attention function named in its configuration with the module itself; we keep what a layer needs on
that module. No mask is registered under our name, so Transformers builds none.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from transformers import AttentionInterface

from kernels.lora import Delta
from kernels.paged_attention import paged_attention
from kernels.rope_store import HeadNorms, Heads, rope_store
from kernels.store_kv import store_kv
from server.model.families import Foreign
from server.model.inputs import CurrentStep
from server.model.masks import Visible
from server.model.probe import KVShape

PAGED = "heddle_paged"


MakeKV = Callable[[int, int], Tensor]  # (heads, dim of a head) -> [blocks, block size, heads, dim], zeros


class CachedLayer(Protocol):
    """The KV cache of one layer, and attention over it."""

    shape: KVShape  # of what a token leaves in it

    def allocate(self, make: MakeKV) -> None:
        """Before the first step, when the number of blocks is known."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv] of the step's tokens -> [T, Hq, Dv]."""


class PagedLayer:
    """Keys and values as attention reads them."""

    def __init__(self, shape: KVShape, visible: Visible, step: CurrentStep) -> None:
        self.shape, self.visible, self._step = shape, visible, step

    def allocate(self, make: MakeKV) -> None:
        self._key = make(self.shape.kv_heads, self.shape.key_dim)
        self._value = make(self.shape.kv_heads, self.shape.value_dim)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        inputs = self._step.inputs
        clear(self._key, inputs.fresh_blocks)
        clear(self._value, inputs.fresh_blocks)
        store_kv(key, value, self._key, self._value, inputs.slot_mapping)
        return self.look_up(query, scale, self.visible, softcap, sinks)

    def turn_and_attend(
        self, qkv: Tensor, heads: Heads, turns: tuple[Tensor, Tensor], norms: HeadNorms | None, delta: Delta | None,
        scale: float, softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """`attend` of what rope_store makes of a product qkv [T, sum of heads.widths]. turns: cosines and sines."""
        inputs = self._step.inputs
        clear(self._key, inputs.fresh_blocks)
        clear(self._value, inputs.fresh_blocks)
        query = rope_store(qkv, heads, *turns, self._key, self._value, inputs.slot_mapping, norms, delta)
        return self.look_up(query, scale, self.visible, softcap, sinks)

    def look_up(
        self, query: Tensor, scale: float, visible: Visible, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """What `attend` returns, from what is there already."""
        return paged_attention(query, self._key, self._value, self._step.inputs.attention, scale, visible.window,
                               softcap, sinks, visible.chunk)  # fmt: skip


class BorrowingLayer:
    """A layer without keys and values of its own: it attends to those of an earlier one (Gemma 3n, Gemma 4)."""

    shape = KVShape(0, 0, 0)

    def __init__(self, source: PagedLayer, visible: Visible) -> None:
        self._source, self.visible = source, visible

    def allocate(self, make: MakeKV) -> None:
        """Nothing."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        return self._source.look_up(query, scale, self.visible, softcap, sinks)


def clear(cache: Tensor, fresh_blocks: Tensor | None) -> None:
    """Zero the blocks that come into use.

    What a block's last owner left in it is read as padding and masked, but NaN and infinity survive a mask: one
    adapter's overflow would reach another's answers. Kernels do not read it (None).
    """
    if fresh_blocks is not None:
        cache.index_fill_(0, fresh_blocks, 0)


def _paged(
    module: Foreign,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The attention interface: query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, Dv] -> [1, T, Hq, Dv].

    Other arguments (dropout, the window as the call site sees it) are either meaningless here or known better.
    """
    assert not isinstance(attention_mask, Tensor)
    layer: CachedLayer = module.cached_layer
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(q, k, v, scale, softcap, s_aux)[None], None


AttentionInterface.register(PAGED, _paged)


def attach(module: Foreign, layer: CachedLayer) -> None:
    """Let an attention module find its cache."""
    module.cached_layer = layer
