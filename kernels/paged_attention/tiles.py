"""How large the tiles of scores are, and how a head size is cut into powers of two."""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """A tile of scores, and with what it is computed."""

    block_m: int  # rows: queries times heads
    block_n: int  # keys
    num_warps: int
    num_stages: int
    programs: int  # that a multiprocessor is given at once, and some to follow


def choose_tile(dim: int, rows: int, element_size: int, is_amd: bool = bool(torch.version.hip)) -> Tile:
    """dim: elements of a key. rows: the most that a sequence has, its queries times the heads that share a key head.

    element_size: bytes of an element of the query.
    """
    if element_size > 2:  # float32 is multiplied without tensor cores, from registers
        return Tile(16, 16, 4, 2, 8)
    if dim > 256:  # absorbed MLA: accumulators of 512 columns. Two tiles of keys pass a CDNA3's 64 KiB of shared memory
        if is_amd:
            return Tile(16 if rows <= 16 else 32, 16, 8, 2, 4)
        return Tile(16 if rows <= 16 else 32, 32, 8, 3, 4)
    if rows <= 16:
        return Tile(16, 64, 4, 3, 8) if dim <= 128 else Tile(16, 32, 4, 3, 8)
    if dim > 128:
        return Tile(64, 64 if dim <= 192 and not is_amd else 32, 8, 2, 2)
    return Tile(64, 32, 4, 3, 4) if rows <= 64 else Tile(128, 32 if is_amd else 64, 8, 2, 2)


def least_keys(tile: Tile) -> int:
    """Of a chunk. A part is written and read once more: rows * value elements of float32, twice.

    A decode has few rows, and 128 keys already take longer than their part. The part of 128 rows takes as long as
    a few hundred keys do.
    """
    return 128 if tile.block_m <= 32 else 16 * tile.block_m


def split_dim(dim: int) -> tuple[int, int]:
    """A head size as a power of two and a smaller one, or 0; a product takes 16 at least. 576 = 512 + 64."""
    padded = max(16, power_of_two(dim))
    main = padded // 2
    tail = max(16, power_of_two(dim - main))
    return (main, tail) if padded > 16 and tail < main else (padded, 0)


def power_of_two(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()
