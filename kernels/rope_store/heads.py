"""How a row of queries, keys and values is divided, and what is done to its heads."""

from typing import NamedTuple

from torch import Tensor


class Heads(NamedTuple):
    """query heads of `dim` elements, then kv heads of `dim`, then kv heads of `value_dim`. rotated: how many of a
    head's elements rope turns, the first; an even number."""

    query: int
    kv: int
    dim: int
    value_dim: int
    rotated: int

    @property
    def widths(self) -> tuple[int, int, int]:
        return self.query * self.dim, self.kv * self.dim, self.kv * self.value_dim


class HeadNorms(NamedTuple):
    """The norms of queries' and keys' heads: weights [dim], and what both have as rms_norm takes it."""

    query: Tensor
    key: Tensor
    eps: float
    offset: float = 0.0
    cast_first: bool = True
