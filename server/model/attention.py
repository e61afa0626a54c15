"""Our attention inside Transformers' models.

A model calls the attention function named in its configuration with the module itself; we keep what a layer needs on
that module. No mask is registered under our names, so Transformers builds none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kernels.paged_attention import paged_attention
from kernels.store_kv import store_kv
from server.model.families import LayerWindow
from server.model.inputs import CurrentStep

PAGED = "heddle_paged"
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


class PagedLayer:
    """The KV cache of one layer, and attention over it."""

    def __init__(self, shape: KVShape, num_blocks: int, block_size: int, window: LayerWindow, step: CurrentStep,
                 dtype: torch.dtype) -> None:  # fmt: skip
        # the system hands out zero pages lazily, so an unused cache costs no memory
        self._key = torch.zeros(num_blocks, block_size, shape.kv_heads, shape.key_dim, dtype=dtype)
        self._value = torch.zeros(num_blocks, block_size, shape.kv_heads, shape.value_dim, dtype=dtype)
        self._window = window
        self._step = step

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv] of the step's tokens -> [T, Hq, Dv]."""
        inputs = self._step.inputs
        # what a block's last owner left in it is read as padding and masked, but NaN and infinity survive a mask: one
        # adapter's overflow would reach another's answers
        self._key.index_fill_(0, inputs.fresh_blocks, 0)
        self._value.index_fill_(0, inputs.fresh_blocks, 0)
        store_kv(key, value, self._key, self._value, inputs.slot_mapping)
        return paged_attention(query, self._key, self._value, inputs.attention, scale, self._window, softcap, sinks)


def _paged(
    module: nn.Module,
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
    assert attention_mask is None
    layer: PagedLayer = module.paged_layer  # type: ignore[assignment]
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(*rows, scale, softcap, s_aux)[None], None


def _probe(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object
) -> tuple[Tensor, None]:
    """Record the shapes that a layer caches; the values do not matter."""
    module.kv_shape = KVShape(key.shape[1], key.shape[-1], value.shape[-1])  # type: ignore[assignment]
    return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None


AttentionInterface.register(PAGED, _paged)
AttentionInterface.register(PROBE, _probe)


@torch.inference_mode()
def probe_kv_shapes(model: nn.Module) -> list[KVShape]:
    """What each layer caches for a token, found by running one token: configurations name these in too many ways."""
    _set_attention(model, PROBE)
    model.config._experts_implementation = "eager"  # the only one of Transformers' that takes every shape
    model(input_ids=torch.zeros(1, 1, dtype=torch.int64), position_ids=torch.zeros(1, 1, dtype=torch.int64),
          use_cache=False, logits_to_keep=1)  # fmt: skip
    return [module.kv_shape for module in _attention_modules(model)]


def install_paged_attention(
    model: nn.Module,
    shapes: list[KVShape],
    windows: list[LayerWindow],
    num_blocks: int,
    block_size: int,
    step: CurrentStep,
    dtype: torch.dtype,
) -> None:
    """Give each layer its cache, and switch the model over to paged attention."""
    for module, shape, window in zip(_attention_modules(model), shapes, windows, strict=True):
        module.paged_layer = PagedLayer(shape, num_blocks, block_size, window, step, dtype)
    _set_attention(model, PAGED)


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    """In order of layer; found by what the probe left on them."""
    return sorted((m for m in model.modules() if hasattr(m, "kv_shape")), key=lambda module: module.layer_idx)


def _set_attention(model: nn.Module, name: str) -> None:
    model.config._attn_implementation = name
