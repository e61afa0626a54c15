"""Sizes of blocks by chip.

An op keeps the sizes of its blocks in one place, as a mapping from chips to what they take:

    SIZES = {
        "": {16: Blocks(...), 64: Blocks(...)},   # estimated; any chip
        "sm_90": {64: Blocks(...)},               # estimated; what is better on these
        "H200": {64: Blocks(...)},                # measured on an H200, 2026-12-01, Triton 3.9, driver 580
    }

The keys inside are what sizes depend on beside the chip, such as the rows of a tile. Each entry says in a comment where
it comes from.
"""

from collections.abc import Hashable, Mapping
from typing import TypeAlias, TypeVar

from kernels.compiled.kernel import Chip

Key = TypeVar("Key", bound=Hashable)
Size = TypeVar("Size")
ByChip: TypeAlias = Mapping[str, Mapping[Key, Size]]


def size_on(chip: Chip, sizes: ByChip[Key, Size], key: Key) -> Size:
    """From the entry for a part of the chip's name if that has the key, else for its architecture, else for any."""
    named = [part for part in sizes if part and part in chip.name]
    for part in (*named, chip.architecture, ""):
        if key in sizes.get(part, {}):
            return sizes[part][key]
    raise KeyError(f"no size for {key} on {chip}")
