"""What a token of a layer sees, read off the mask that Transformers would have built for that layer.

Configurations say it in too many ways, some of which have no effect in their family, and not every attention call says
it. The mask function is what decides: (batch, head, position of the query, position of the key) -> whether it is seen.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AttentionMaskInterface

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_AT_ONCE = 1 << 20  # keys


class UnknownMaskError(Exception):
    """Not what paged attention computes; the message says what is seen."""


class Visible(NamedTuple):
    """What a token sees of those up to itself: all, or the last `window`, or those of its own chunk, where chunks of so
    many tokens are counted from the sequence's first."""

    window: int | None = None
    chunk: int | None = None

    def __str__(self) -> str:
        if self.window is not None:
            return f"with a window of {self.window:,}"
        return "full" if self.chunk is None else f"in chunks of {self.chunk:,}"

    def first_key(self, position: int) -> int:
        first = 0 if self.window is None else max(0, position - self.window + 1)
        return first if self.chunk is None else max(first, position // self.chunk * self.chunk)


class LayerMask:
    """The mask of some layers, which is asked instead of built."""

    def __init__(self, function: MaskFunction, device: torch.device) -> None:
        self._function, self._device = function, device
        self._runs: dict[tuple[int, int], int] = {}
        self._visible: dict[int, Visible] = {}

    def seen(self, query: int, keys: range) -> Tensor:
        """[keys] bool"""
        zero = torch.zeros((), dtype=torch.int64, device=self._device)
        positions = torch.arange(keys.start, keys.stop, device=self._device)
        return self._function(zero, zero, zero + query, positions).expand(positions.shape)

    def visible(self, length: int) -> Visible:
        """In a layer that is served up to `length` tokens: a limit beyond them is none. Raises UnknownMaskError."""
        if length not in self._visible:
            self._visible[length] = self._find(length)
        return self._visible[length]

    def _find(self, length: int) -> Visible:
        found = self._guess(length)
        size = found.window or found.chunk or length
        places = (0, 1, size - 1, size, size + 1, 2 * size, length // 2, length - size, length - 2, length - 1)
        for query in places:
            if 0 <= query < length and self._first_key(query, length) != found.first_key(query):
                raise UnknownMaskError(
                    f"the token at position {query} sees those from {self._first_key(query, length)} on, where its "
                    f"layer's others say {found.first_key(query)}"
                )
        return found

    def _guess(self, length: int) -> Visible:
        """A window moves on by one token with each query, and a chunk stays or is left as a whole."""
        first = self._first_key(length - 1, length)
        if first == 0:
            return Visible()
        if self._first_key(length - 2, length) == first - 1:
            return Visible(window=length - first)
        return Visible(chunk=first - self._first_key(first - 1, length))

    def _first_key(self, query: int, length: int) -> int:
        """Of those that a query sees, which are one run that ends with the query itself."""
        if (query, length) not in self._runs:
            self._runs[query, length] = self._run(query, length)
        return self._runs[query, length]

    def _run(self, query: int, length: int) -> int:
        first, last, count = length, -1, 0
        for start in range(0, length, _AT_ONCE):
            (there,) = self.seen(query, range(start, min(start + _AT_ONCE, length))).nonzero(as_tuple=True)
            if len(there):
                first, last = min(first, start + int(there[0])), start + int(there[-1])
                count += len(there)
        if last > query:
            raise UnknownMaskError(f"the token at position {query} sees one after it, at {last}")
        if last != query or count != query + 1 - first:
            raise UnknownMaskError(
                f"the token at position {query} sees {count:,} tokens between {first} and {last}, which are no run "
                "that ends with itself"
            )
        return first


def mask_of(tensor: Tensor | None) -> LayerMask:
    """Of what an attention call got as its mask. Raises UnknownMaskError."""
    mask = getattr(tensor, "layer_mask", None)
    if not isinstance(mask, LayerMask):
        raise UnknownMaskError("it is given no mask" if tensor is None else "it is given a mask of its family's making")
    return mask


def hand_on_masks(implementation: str) -> None:
    """Under this name of an attention implementation models get, in the place of each mask, a tensor that has the
    mask's function with it: they hand it through to their layers' attention. What it holds is not looked at."""
    AttentionMaskInterface.register(implementation, _unbuilt)


def _unbuilt(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: MaskFunction,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **_: object,
) -> Tensor:
    tensor = torch.zeros(batch_size, 1, q_length, kv_length, dtype=dtype, device=device)
    tensor.layer_mask = LayerMask(mask_function, tensor.device)  # type: ignore[attr-defined]
    return tensor
