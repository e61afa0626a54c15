"""expert_tiles: cut the tiles of routed experts where the adapter changes.

expert_route puts the (token, choice) pairs of a step in order of expert place, and cuts them into tiles of one place
each: what a product with the base's weights reads. An adapter's own weights for that expert belong to its own rows
only. The tokens of a step are in order of adapter slot and a place's pairs in order of number, so within a place each
adapter's rows are next to each other: cutting is enough, and both products read rows in the same order.

    entry = slot * M + expert      for a tile whose rows are all of one adapter and of one of the base's M experts

Running example, with M = 4 experts and 2 choices a token: token 0 is the base's, tokens 1 and 2 have the adapter in
slot 1, token 3 the one in slot 2, which replaces expert 0 by what lies in place 5.

    slots   [0, 1, 1, 2]
    pairs   [1, 2, 4, 7, 0, 3, 5, 6]
    tiles   [[1, 0, 4], [2, 4, 3], [5, 7, 1]]   place, first position, rows
    cut     [[5, 1, 2], [9, 3, 1], [6, 5, 2]]   entry, first position, rows; in any order

Of the four pairs of expert 1 the first is the base's, the next two are of slot 1 (entry 1 * 4 + 1) and the last is of
slot 2 (entry 2 * 4 + 1). Places behind the base's experts are adapters' own already, and left out.
"""

from typing import NamedTuple

from torch import Tensor

from kernels.compiled import takes
from kernels.expert_route import Routed

__all__ = ["ExpertTiles", "expert_tiles"]


class ExpertTiles(NamedTuple):
    """Rows of routed experts that are all of one adapter and of one of the base's experts."""

    tiles: Tensor  # [P, 3] int32: entry, first position, rows; in any order, garbage behind the last
    num_tiles: Tensor  # [1] int32
    tile_rows: int  # the most rows of a tile


def expert_tiles(routed: Routed, slots: Tensor, num_experts: int) -> ExpertTiles:
    """See reference.py for shapes."""
    if takes(slots):
        from kernels.expert_tiles import kernel

        return kernel.expert_tiles(routed, slots, num_experts)
    from kernels.expert_tiles import reference

    return reference.expert_tiles(routed, slots, num_experts)
