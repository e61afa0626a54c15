"""The identity of an adapter."""

from typing import Literal

import msgspec

Kind = Literal["lora", "esft"]


class AdapterRef(msgspec.Struct, frozen=True):
    """What a request holds on to: the name it asked for, and the weights that name meant at that moment.

    `revision` is a hash of the weights and of the configuration that scales them. Caches are keyed by it, and pins
    by the whole reference, never by the name alone: it can come to mean other weights while requests for the old run.
    """

    name: str
    revision: str
    kind: Kind
