"""How much of an adapter there is room for, asked before its bytes are read."""

from collections import Counter
from collections.abc import Sequence

import msgspec

from adapters_store.errors import UnsupportedAdapter
from adapters_store.parts import ExpertReplacement, Part, tensors_of


class Room(msgspec.Struct, frozen=True):
    """What the server could give one adapter if it held no other.

    `num_bytes` for all its weights, each taking `bytes_per_element`; `experts_per_layer` is E_max.
    """

    num_bytes: int
    bytes_per_element: int
    experts_per_layer: int

    def check(self, parts: Sequence[Part]) -> None:
        """Refuse what could never be on the device. Raises UnsupportedAdapter with the numbers."""
        needed = sum(tensor.num_elements for part in parts for tensor in tensors_of(part)) * self.bytes_per_element
        if needed > self.num_bytes:
            raise UnsupportedAdapter(
                f"the adapter needs {needed:,} bytes; all adapters together may use {self.num_bytes:,} "
                "(--adapter-bytes)"
            )
        by_layer = Counter(part.layer for part in parts if isinstance(part, ExpertReplacement))
        for layer, count in sorted(by_layer.items()):
            if count > self.experts_per_layer:
                raise UnsupportedAdapter(
                    f"the adapter tunes {count} experts of layer {layer}; this server has room for "
                    f"{self.experts_per_layer} (--max-experts-per-adapter)"
                )
