"""Reference and CPU path of expert_tiles."""

import torch
from torch import Tensor

from kernels.expert_route import Routed
from kernels.expert_tiles import ExpertTiles

_MOST_SLOTS = 1 << 31


def expert_tiles(routed: Routed, slots: Tensor, num_experts: int) -> ExpertTiles:
    """routed: of T tokens with K choices each; slots [T] int32: the adapter slot of each token, 0 for the base.

    num_experts: M, how many experts the base has. Left out are the base's rows, and places from M on.
    """
    tiles = routed.tiles[: int(routed.num_tiles)].long()
    tiles = tiles[tiles[:, 0] < num_experts]
    place, first, count = tiles.unbind(1)
    tile = torch.arange(len(tiles), device=slots.device).repeat_interleave(count)  # of each row of these tiles
    position = first[tile] + torch.arange(len(tile), device=slots.device) - (count.cumsum(0) - count)[tile]
    slot = slots[routed.pairs[position].long() // routed.places.shape[1]].long()
    lengths = torch.unique_consecutive(tile * _MOST_SLOTS + slot, return_counts=True)[1]
    starts = lengths.cumsum(0) - lengths  # runs of rows of one tile and one slot
    cut = torch.stack([slot[starts] * num_experts + place[tile[starts]], position[starts], lengths], dim=-1)
    cut = cut[slot[starts] > 0].int()
    return ExpertTiles(cut, torch.tensor([len(cut)], dtype=torch.int32, device=slots.device), routed.tile_rows)
