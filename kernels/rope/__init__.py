"""rope: rotary position embedding of a step's queries and keys, in one launch."""

from torch import Tensor

from kernels.compiled import takes
from kernels.rope import reference

__all__ = ["rope", "rope_complex"]


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """See kernels/rope/reference.py, as for rope_complex."""
    if takes(query):
        from kernels.rope import kernel

        return kernel.rope(query, key, cos, sin, interleaved)
    return reference.rope(query, key, cos, sin, interleaved)


def rope_complex(query: Tensor, key: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    if takes(query):
        from kernels.rope import kernel

        return kernel.rope_complex(query, key, frequencies)
    return reference.rope_complex(query, key, frequencies)
