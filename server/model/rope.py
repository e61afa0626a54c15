"""Rotary embeddings in one launch, in place of the several that Transformers' take."""

import inspect
import types
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.rope import rope, rope_complex
from server.model.families import Foreign


def _rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope(query, key, cos, sin)


def _rope_interleaved(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope(query, key, cos, sin, interleaved=True)


def _rope_complex(query: Tensor, key: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    return rope_complex(query, key, torch.view_as_real(frequencies))


_ROPES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "apply_rotary_pos_emb": _rope,
    "apply_rotary_pos_emb_interleave": _rope_interleaved,
    "apply_rotary_emb": _rope_complex,
}


def fuse_rope(attention: Foreign) -> None:
    """Let this module call our rope where its family's file calls its own.

    The function is a global of that file, and other models of the process use it too. So the module gets a copy of its
    forward whose globals differ in that name. Phi-3 is left as it is: it rotates a part of the head only.
    """
    forward = inspect.unwrap(type(attention).forward)
    ours = {name: function for name, function in _ROPES.items() if name in forward.__code__.co_names}
    if type(attention).__name__ == "Phi3Attention" or not ours:
        return
    copied = types.FunctionType(
        forward.__code__, {**forward.__globals__, **ours}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    attention.forward = types.MethodType(copied, attention)
