"""The identity of an adapter."""

from typing import Literal

import msgspec

Kind = Literal["lora", "esft"]


class AdapterRef(msgspec.Struct, frozen=True, eq=False):
    """What a request holds on to: the name it asked for, and the weights that name meant at that moment.

    `revision` is a hash of the weights and of the configuration that scales them. It is the identity: two references
    are equal if they mean the same weights, whatever these are called. So pins, pages and caches, which are kept by
    reference, are shared by all names of the same weights, and never by two meanings of one name. `name` is for people.
    """

    name: str
    revision: str
    kind: Kind

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterRef) and self.revision == other.revision

    def __ne__(self, other: object) -> bool:  # Struct has one of its own, which compares identities
        return not self == other

    def __hash__(self) -> int:
        return hash(self.revision)
