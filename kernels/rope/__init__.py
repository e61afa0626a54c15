"""rope: rotary position embedding of a step's queries and keys.

The elements of a head are taken in pairs (a, b), and pair i of token t is turned by the angle whose cosine and sine are
cos[t, i] and sin[t, i]:

    a' = a * cos - b * sin        b' = b * cos + a * sin

Models differ in which elements are pairs, and in where the results go.

Running example, a head [1, 2, 3, 4]; pair 0 turns by 90 degrees (cos 0, sin 1), pair 1 by nothing (cos 1, sin 0):

    rope                      pairs (1, 3) and (2, 4)    [-3, 2, 1, 4]
    rope, interleaved         pairs (1, 2) and (3, 4)    [-2, 3, 1, 4]     first halves of the pairs, then second ones
    rope_complex              pairs (1, 2) and (3, 4)    [-2, 1, 3, 4]
"""

from torch import Tensor

from kernels.compiled import takes
from kernels.host import takes as host_takes
from kernels.rope import host, reference

__all__ = ["rope", "rope_complex"]


def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """See reference.py for shapes."""
    if takes(query):
        from kernels.rope import kernel

        return kernel.rope(query, key, cos, sin, interleaved)
    if host_takes(query):
        return host.rope(query, key, cos, sin, interleaved)
    return reference.rope(query, key, cos, sin, interleaved)


def rope_complex(query: Tensor, key: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.py for shapes."""
    if takes(query):
        from kernels.rope import kernel

        return kernel.rope_complex(query, key, frequencies)
    if host_takes(query):
        return host.rope_complex(query, key, frequencies)
    return reference.rope_complex(query, key, frequencies)
