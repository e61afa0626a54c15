"""How a router's logits become choices, and what the choices look like to a grouped product."""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class Score(IntEnum):
    """What experts are ranked by, and what becomes their weight."""

    SOFTMAX = 0  # probabilities over all experts
    SIGMOID = 1  # of each expert's logit by itself (DeepSeek-V3)
    SOFTMAX_OF_CHOSEN = 2  # ranked by logit; weights are the softmax of the chosen logits only (gpt-oss)
    GIVEN = 3  # what is given as logits are weights already; whoever is not chosen has a lower one (see Choices)


class GroupScore(IntEnum):
    """What a group of experts is ranked by, where the choice is limited to the best groups."""

    MAX = 0  # its best expert's score (DeepSeek-V2)
    TOP2_SUM = 1  # the sum of its two best (DeepSeek-V3)


@dataclass(frozen=True)
class Routing:
    """One router's rule.

    top_k: experts that a token takes. score: what experts are ranked by.
    renormalise: divide the weights of the chosen experts by their sum. scale: multiply the weights by this, at the end.
    num_groups > 1: experts form that many groups of equal size, and only those of the top_groups best groups take part;
        group_score says which are best.
    """

    top_k: int
    score: Score = Score.SOFTMAX
    renormalise: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = GroupScore.MAX


class Shared(NamedTuple):
    """Experts that every token takes beside those that it chooses, with weight 1: ids M..M + num - 1.

    only_own: only where the token's adapter has experts of its own in their place. The others' places are -1: what the
    base's shared experts say is added elsewhere.
    """

    num: int = 0
    only_own: bool = False


NO_SHARED = Shared()


class TokenBatch(NamedTuple):
    """What routing needs to know of a step's tokens."""

    slots: Tensor | None  # [T] int32: adapter slot of each, 0 for the base; None if none has an expert adapter
    num_tokens: Tensor | None = None  # [1] int32: tokens from there on only pad the batch
    counters: Tensor | None = None  # for kernels: [2] int32, zero; left zero
    shared: Shared = NO_SHARED


class RouterLinear(NamedTuple):
    """What a router's logits are made with: x [T, H] -> [T, M], in float32.

    as_x: the weight's numbers are of x's type, whatever type they are kept in; their products are exact then.
    """

    weight: Tensor  # [M, H]
    bias: Tensor | None = None  # [M]
    as_x: bool = False


class Routed(NamedTuple):
    """Choices of a step's tokens, and the (token, choice) pairs in order of expert place, cut into tiles.

    K counts shared experts too, which come behind the chosen. The example is in __init__.py.
    """

    weights: Tensor  # [T, K] float32
    places: Tensor  # [T, K] int32: row of the expert stack; -1: none (a token that only pads the batch, or see Shared)
    pairs: Tensor  # [T * K] int32: pair number at each position; behind the pairs that have a place, anything
    tiles: Tensor  # [most tiles there can be, 3] int32: place, first position, rows; in any order
    num_tiles: Tensor  # [1] int32
    tile_rows: int  # the most rows of a tile
    num_pairs: Tensor | None = None  # [1] int32: pairs that have a place, where kernels compute


def max_tiles(num_pairs: int, num_places: int, tile_rows: int) -> int:
    """The most tiles that so many pairs can be cut into: every place in use may end in a tile that is not full."""
    in_use = min(num_pairs, num_places)
    return in_use + (num_pairs - in_use) // tile_rows
