"""How much of an adapter's headers is read, before anything is known of it but its size."""

import msgspec

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import InvalidAdapter

MIN_HEADER_BYTES, MAX_HEADER_BYTES = 1 << 20, 16 << 20
MIN_TENSORS, MAX_TENSORS = 20_000, 120_000
_BYTES_PER_TENSOR = 192  # of a header: real ones take 110 to 150
_PER_LINEAR = 3  # A, B and a magnitude
_PER_EXPERT = 6  # A and B of gate, up and down


class Limits(msgspec.Struct, frozen=True):
    """Of one adapter: bytes of each JSON text (headers and indices), tensors in all its files together."""

    header_bytes: int = MIN_HEADER_BYTES
    tensors: int = MIN_TENSORS

    def check_count(self, count: int, name: str) -> None:
        if not 1 <= count <= self.tensors:
            raise InvalidAdapter(
                f"{name} holds {count:,} tensors; 1 to {self.tensors:,} are served: train fewer modules, or leave out "
                "what is not the adapter's own"
            )


def limits_of(base: BaseSpec) -> Limits:
    """What an adapter of everything that this base has would need, within reason: 48 layers of 128 experts under a
    name each are 36,864 tensors."""
    num_experts = sum(stack.num_experts + stack.num_shared for stack in base.experts.values())
    needed = _PER_LINEAR * len(base.linears) + _PER_EXPERT * num_experts
    tensors = min(max(MIN_TENSORS, needed), MAX_TENSORS)
    return Limits(min(max(MIN_HEADER_BYTES, needed * _BYTES_PER_TENSOR), MAX_HEADER_BYTES), tensors)
