"""How parts of queries and keys are rotated: which elements are pairs, and by which angles (kernels/rope)."""

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class Pairing(IntEnum):
    HALVES = 0  # elements i and i + R / 2
    INTERLEAVED = 1  # neighbours, whose results go to halves
    ADJACENT = 2  # neighbours, and they stay neighbours


class Turns(NamedTuple):
    """cos, sin [T, at least R / 2], of the same strides: of the angle by which pair i of token t turns."""

    cos: Tensor
    sin: Tensor
    pairing: Pairing
