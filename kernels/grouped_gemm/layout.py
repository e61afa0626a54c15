"""How expert weights lie in memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How a stack of matrices, one for each expert place, lies in memory.

    transposed: [places, in, out]; otherwise [places, out, in].
    interleaved: gate and up alternate among the outputs of gate_up (gpt-oss); otherwise all gates come before all ups.
    """

    transposed: bool = False
    interleaved: bool = False
