"""How much of an adapter there is room for, asked before its bytes are read."""

from collections.abc import Sequence

import msgspec

from adapters_store.errors import UnsupportedAdapter
from adapters_store.parts import Part, by_kind


class Room(msgspec.Struct, frozen=True):
    """What the server could give one adapter if it held no other.

    `num_bytes` for all its weights, each taking `bytes_per_element` (some more: those of routers and DoRA's gains are
    float32); `experts_per_layer` is E_max.
    """

    num_bytes: int
    bytes_per_element: int
    experts_per_layer: int

    def check(self, parts: Sequence[Part]) -> None:
        """Refuse what could never be on the device. Raises UnsupportedAdapter with the numbers."""
        needed = sum(part.num_bytes(self.bytes_per_element) for part in parts)
        if needed > self.num_bytes:
            raise UnsupportedAdapter(
                f"the adapter needs {needed:,} bytes; all adapters together may use {self.num_bytes:,} "
                "(raise --adapter-bytes)"
            )
        for kind, own in by_kind(parts).items():
            problem = kind.lack_of_room(own, self)
            if problem is not None:
                raise UnsupportedAdapter(problem)
