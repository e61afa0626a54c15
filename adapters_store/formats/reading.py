"""What a format's reader makes of a directory, before a byte of weights is read."""

import msgspec

from adapters_store.parts import Part
from adapters_store.ref import Kind
from adapters_store.safetensors_file import Weights


class Reading(msgspec.Struct, frozen=True):
    """`meaning` is what the configuration adds to the weights, their scales: it is part of the revision, whereas names
    and places are not."""

    kind: Kind
    weights: tuple[Weights, ...]
    parts: tuple[Part, ...]
    meaning: str = ""
    declared_base: str | None = None
