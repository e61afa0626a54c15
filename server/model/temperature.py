"""Queries that grow with their position (Llama 4's layers without rotary embedding): by each token's own.

Transformers counts positions from the beginning of the row, which in a mixed batch is another sequence's.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from server.model.attention import CachedLayer, MakeKV
from server.model.families import Foreign
from server.model.inputs import CurrentStep


class Temperature:
    """By how much an attention module's queries grow."""

    def __init__(self, attention: Foreign) -> None:
        self._scale, self._floor = float(attention.attn_scale), float(attention.floor_scale)

    def __call__(self, query: Tensor, positions: Tensor) -> Tensor:
        """query [.., T, H, D], positions [T]."""
        factors = torch.log1p(torch.floor((positions.float() + 1.0) / self._floor)) * self._scale + 1.0
        return (query * factors[:, None, None]).to(query.dtype)


class TunedLayer:
    """A layer whose queries are scaled before they attend."""

    def __init__(self, layer: CachedLayer, temperature: Temperature, step: CurrentStep) -> None:
        self.inner, self._step, self.shape = layer, step, layer.shape
        self._temperature = temperature

    def allocate(self, make: MakeKV) -> None:
        self.inner.allocate(make)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        tuned = self._temperature(query, self._step.inputs.positions)
        return self.inner.attend(tuned, key, value, scale, softcap, sinks)


def with_temperature(layer: CachedLayer, attention: Foreign, step: CurrentStep) -> CachedLayer:
    """The layer, in which what the module would do to its queries is done instead, if it does it."""
    temperature = _taken(attention)
    return layer if temperature is None else TunedLayer(layer, temperature, step)


@contextmanager
def temperatures_taken(attentions: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Temperature]]:
    """Of those modules that have one, which do not apply it themselves as long as this lasts."""
    taken = {it: temperature for it in attentions if (temperature := _taken(it)) is not None}
    try:
        yield taken
    finally:
        for it in taken:
            it.attn_temperature_tuning = True  # type: ignore[assignment]


def _taken(attention: Foreign) -> Temperature | None:
    """What the module does to its queries, if it does it; it does not do it any more."""
    if not getattr(attention, "attn_temperature_tuning", False) or getattr(attention, "use_rope", True):
        return None
    attention.attn_temperature_tuning = False
    return Temperature(attention)
