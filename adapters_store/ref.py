"""The identity of an adapter."""

from typing import Literal

import msgspec

Kind = Literal["lora", "esft"]


class AdapterRef(msgspec.Struct, frozen=True):
    """What a request holds on to: the name it asked for, and the weights that name meant at that moment.

    `revision` is a hash of the weights and of the configuration that scales them. Caches and pins are keyed by it,
    never by the name: a name can come to mean other weights while requests for the old ones still run.
    """

    name: str
    revision: str
    kind: Kind
