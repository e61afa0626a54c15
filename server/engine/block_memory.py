"""Where KV blocks lie, as far as bookkeeping goes. The real one is server/weights/kv_memory.py."""

from collections.abc import Collection
from typing import Protocol

Extent = int  # a run of blocks whose memory comes and goes together: blocks [extent * extent_blocks, + extent_blocks)


class BlockMemory(Protocol):
    """Memory under blocks, of which there is less than all of them could use: adapters share it."""

    @property
    def extent_blocks(self) -> int:
        """Blocks of an extent."""

    def num_obtainable(self) -> int:
        """Extents that could be had now, if need be out of what others hold and do not use."""

    def num_left(self) -> int:
        """Extents that the pool may have, where somebody claims memory: fewer than it has, perhaps. Else all."""

    def take(self, extent: Extent, unused_since: float) -> bool:
        """Memory for an extent that has none. From others only what nobody has used since then (seconds of the clock
        that steps are told of). False, and nothing has changed, where it cannot be had."""

    def give_back(self, extent: Extent) -> None:
        """Undo a take. What was there is lost."""

    def check(self, there: Collection[Extent]) -> None:
        """Recompute what is kept incrementally. there: those that were taken."""


class OwnMemory:
    """Memory that nobody else wants, a block at a time."""

    extent_blocks = 1

    def num_obtainable(self) -> int:
        return 1 << 62

    def num_left(self) -> int:
        return 1 << 62

    def take(self, extent: Extent, unused_since: float) -> bool:
        return True

    def give_back(self, extent: Extent) -> None:
        pass

    def check(self, there: Collection[Extent]) -> None:
        pass
