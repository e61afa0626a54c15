"""How a router's logits become choices, and what the choices look like to a grouped product."""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from torch import Tensor


class Score(IntEnum):
    """What is ranked: probabilities over all experts, independent ones, or the logits themselves."""

    SOFTMAX = 0
    SIGMOID = 1
    SOFTMAX_OF_CHOSEN = 2  # softmax over the chosen logits only (gpt-oss)


class GroupScore(IntEnum):
    """What a group of experts is ranked by, where the choice is limited to the best groups."""

    MAX = 0  # DeepSeek-V2
    TOP2_SUM = 1  # DeepSeek-V3


@dataclass(frozen=True)
class Routing:
    """One router's rule.

    top_k experts a token. num_groups > 1: only experts of the top_groups best groups of equal size take part.
    renormalise: the weights of the chosen ones sum to 1 (before scale).
    """

    top_k: int
    score: Score = Score.SOFTMAX
    renormalise: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: GroupScore = GroupScore.MAX


class TokenBatch(NamedTuple):
    """What routing needs to know of a step's tokens."""

    slots: Tensor | None  # [T] int32: adapter slot of each, 0 for the base; None if none has an expert adapter
    num_tokens: Tensor | None = None  # [1] int32: tokens from there on only pad the batch
    counters: Tensor | None = None  # for kernels: [2] int32, zero; left zero


class Routed(NamedTuple):
    """Choices of a step's tokens, and the (token, choice) pairs sorted by expert place and cut into tiles.

    Running example, 2 tokens with 2 choices each, pairs numbered token * 2 + choice, tiles of at most 1 row:
        places     [[7, 3], [3, 0]]
        weights    [[.6, .4], [.7, .3]]
        pairs      [3, 1, 2, 0]                              in order of place, and of number within a place
        tiles      [[0, 0, 1], [3, 1, 1], [3, 2, 1], [7, 3, 1]]    place, first position, rows; in any order
        num_tiles  [4]       tile_rows  1
    """

    weights: Tensor  # [T, K] float32
    places: Tensor  # [T, K] int32: row of the expert stack; -1: a token that only pads the batch
    pairs: Tensor  # [T * K] int32; behind the pairs of real tokens, anything
    tiles: Tensor  # [most tiles there can be, 3] int32
    num_tiles: Tensor  # [1] int32
    tile_rows: int  # the most rows of a tile


def max_tiles(num_pairs: int, num_places: int, tile_rows: int) -> int:
    """The most tiles that so many pairs can fall into: every place in use may end in one that is not full."""
    in_use = min(num_pairs, num_places)
    return in_use + (num_pairs - in_use) // tile_rows
