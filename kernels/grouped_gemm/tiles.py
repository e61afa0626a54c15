"""How large the tiles of rows are, and the blocks of columns and depth that they are multiplied by, chip by chip."""

from typing import NamedTuple

from kernels.compiled.tiles import ByChip


class Blocks(NamedTuple):
    """Of one product: columns and depth at a time, and how it is compiled and run."""

    columns: int  # of the output: twice as many of gate_up's matrix
    depth: int
    num_warps: int
    num_stages: int
    programs: int = 2  # of a multiprocessor, whose registers and shared memory hold so many
    group: int = 1  # tiles that are worked on together, one block of columns after another
    by_tma: bool = False  # weights are read by descriptors, where their layout has one


# by bytes of an element and rows of a tile. Elements of four bytes are multiplied without matrix instructions, out of
# registers, so their blocks are less deep
GATE_UP: ByChip[tuple[int, int], Blocks] = {
    "": {  # estimated
        (2, 16): Blocks(64, 128, 4, 3),
        (2, 32): Blocks(64, 64, 4, 3),
        (2, 64): Blocks(64, 64, 4, 3),
        (2, 128): Blocks(64, 64, 8, 4, programs=1, group=8),
        (4, 16): Blocks(64, 32, 8, 2),
        (4, 32): Blocks(64, 16, 8, 2),
        (4, 64): Blocks(64, 16, 8, 2),
        (4, 128): Blocks(32, 16, 8, 2, group=8),
    },
    "sm_90": {  # estimated
        (2, 16): Blocks(64, 128, 4, 3, programs=3),
        (2, 32): Blocks(64, 64, 4, 3, programs=3),
        (2, 64): Blocks(64, 64, 4, 3, programs=3),
        (2, 128): Blocks(128, 64, 8, 4, programs=1, group=8, by_tma=True),
    },
}
DOWN: ByChip[tuple[int, int], Blocks] = {
    "": {  # estimated
        (2, 16): Blocks(64, 128, 4, 4),
        (2, 32): Blocks(64, 128, 4, 3),
        (2, 64): Blocks(128, 64, 8, 3),
        (2, 128): Blocks(128, 64, 8, 4, programs=1, group=8),
        (4, 16): Blocks(64, 32, 8, 2),
        (4, 32): Blocks(64, 32, 8, 2),
        (4, 64): Blocks(128, 16, 8, 2, programs=1),
        (4, 128): Blocks(64, 16, 8, 2, programs=1, group=8),
    },
    "sm_90": {  # estimated
        (2, 16): Blocks(64, 128, 4, 4, programs=3),
        (2, 32): Blocks(64, 128, 4, 3, programs=3),
        (2, 128): Blocks(256, 64, 8, 4, programs=1, group=8, by_tma=True),
    },
}
TILE_ROWS = (16, 32, 64, 128)


def tile_rows(num_pairs: int, num_experts: int) -> int:
    """Twice the mean rows of an expert, as a power of two from 16 (a matrix instruction's) to 64; 128 where so many
    experts have more than 64 rows that their matrices would often be read twice."""
    if 4 * num_pairs > 3 * 64 * num_experts:
        return 128
    return min(64, max(16, _power_of_two(2 * num_pairs // num_experts)))


def _power_of_two(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << max(0, number - 1).bit_length()
