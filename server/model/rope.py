"""Rotary embeddings in one launch, in place of the several that Transformers' take."""

import inspect
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels.rope import reference, rope, rope_complex
from server.model.families import Foreign
from server.model.likeness import are_alike, numbers, outcome

Rope = Callable[..., tuple[Tensor, Tensor]]
_HEAD = 16  # elements of the heads that functions are tried with


def _rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope(query, key, cos, sin)


def _rope_interleaved(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope(query, key, cos, sin, interleaved=True)


def _rope_complex(query: Tensor, key: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    return rope_complex(query, key, torch.view_as_real(frequencies))


def fuse_rope(attention: Foreign) -> None:
    """Let this module call our rope where its family's file calls its own, if both compute the same.

    The function is a global of that file, and other models of the process use it too. So the module gets a copy of its
    forward whose globals differ in that name.
    """
    forward = inspect.unwrap(type(attention).forward)
    called = [name for name in forward.__code__.co_names if name.startswith("apply_rotary")]
    found = {name: _ours_for(forward.__globals__[name]) for name in called if callable(forward.__globals__.get(name))}
    ours = {name: function for name, function in found.items() if function is not None}
    if not ours:
        return
    copied = types.FunctionType(
        forward.__code__, {**forward.__globals__, **ours}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    attention.forward = types.MethodType(copied, attention)


@lru_cache(maxsize=64)
def _ours_for(theirs: Callable[..., Any]) -> Rope | None:
    """Ours that computes what a family's function does, for every width of cosines that it takes; None: there is none.

    Full width and half, since a function that rotates a part of each head takes full width as well.
    """
    query, key = numbers(1, 4, 5, _HEAD, seed=1), numbers(1, 2, 5, _HEAD, seed=2)
    angles = numbers(1, 5, _HEAD // 2, seed=3)
    wide, narrow = torch.cat([angles, angles], -1), torch.cat([angles[..., : _HEAD // 4]] * 2, -1)
    tried = [(cos_sin, outcome(theirs, query, key, *cos_sin)) for cos_sin in
             ((wide.cos(), wide.sin()), (angles.cos(), angles.sin()), (narrow.cos(), narrow.sin()))]  # fmt: skip
    told = [(cos_sin, it) for cos_sin, it in tried if it is not None]
    for ours, is_interleaved in ((_rope, False), (_rope_interleaved, True)):
        if told and all(are_alike(it, outcome(reference.rope, query, key, *cos_sin, is_interleaved))
                        for cos_sin, it in told):  # fmt: skip
            return ours
    turns = torch.polar(torch.ones_like(angles), angles)
    expected = reference.rope_complex(query, key, torch.view_as_real(turns))
    return _rope_complex if are_alike(outcome(theirs, query, key, turns), expected) else None
