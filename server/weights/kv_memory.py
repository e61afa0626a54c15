"""Where keys and values lie: memory that grows out of the budget that adapters share, and shrinks again."""

import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import gcd, lcm
from typing import Protocol

import torch
from torch import Tensor

from server.engine.block_memory import BlockMemory, Extent, OwnMemory
from server.weights.arena import Arena, ArenaError, PageWork, VirtualArenas
from server.weights.budget import Share

log = logging.getLogger("heddle.weights")
_LEAST_EXTENTS, _MOST_EXTENTS = 16, 512  # so that each is small beside the whole, and they are not too many
_AGAIN_S = 10.0  # after which memory that could not be had is asked for again
_COARSER = 4  # times: extents may be so much larger, if each then ends on a page in every tensor


@dataclass(frozen=True)
class Layout:
    """Blocks, and how many of them make an extent: a page in each tensor, at least."""

    num_blocks: int
    block_size: int
    extent_blocks: int
    extent_bytes: int  # of all tensors together; as many as it can come to where extents share pages
    least_bytes: int  # that come free with an extent, at least

    @staticmethod
    def of(num_bytes: int, block_size: int, tensor_bytes: Sequence[int], page_bytes: int) -> "Layout | None":
        """What fits in so many bytes. None where that is so few extents that there is nothing to share. tensor_bytes:
        of a block, in each tensor."""
        least = -(-page_bytes // min(tensor_bytes))
        aligned = lcm(*(page_bytes // gcd(page_bytes, it) for it in tensor_bytes))
        count = aligned if aligned <= _COARSER * least else least
        # not so many that it takes long to find what is idle
        count *= max(1, num_bytes // (sum(tensor_bytes) * count * _MOST_EXTENTS))
        extent_bytes = sum(_most_pages(count * it, page_bytes) for it in tensor_bytes) * page_bytes
        num_extents = num_bytes // extent_bytes
        if num_extents < _LEAST_EXTENTS:
            return None
        least_bytes = sum(max(0, count * it // page_bytes - (count * it % page_bytes > 0)) for it in tensor_bytes)
        return Layout(num_extents * count, block_size, count, extent_bytes, least_bytes * page_bytes)


def _most_pages(size: int, page_bytes: int) -> int:
    """That a range of this size touches, beginning at a multiple of it."""
    return size // page_bytes if size % page_bytes == 0 else -(-size // page_bytes) + 1


class KVMemory(BlockMemory, Protocol):
    """Makes the tensors of a KV cache: all of one number of blocks."""

    def tensor(self, heads: int, dim: int) -> Tensor:
        """[blocks, block size, heads, dim] of undefined contents. Blocks that nobody was handed may fault."""


class WholeKVMemory(OwnMemory):
    """Of one size for good: on devices without virtual memory of their own, and where it is only some pages. Adapters
    never get any of it."""

    def __init__(self, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._blocks, self._dtype, self._device = (num_blocks, block_size), dtype, device

    def tensor(self, heads: int, dim: int) -> Tensor:
        return torch.zeros((*self._blocks, heads, dim), dtype=self._dtype, device=self._device)


class SharedKVMemory:
    """Pages come and go an extent at a time, under all tensors alike. Counted in bytes of its share of the budget."""

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        share: Share,
        arenas: VirtualArenas,
        do: Callable[[PageWork], None],
    ) -> None:
        """do: runs page work, and returns when it is done. Raises ArenaError where that fails."""
        self._layout, self._dtype = layout, dtype
        self._share, self._arenas, self._do = share, arenas, do
        self._tensors: list[tuple[Arena, int]] = []  # and how many bytes of it an extent has
        self._there: set[Extent] = set()
        self._refused_at = -math.inf  # seconds

    def tensor(self, heads: int, dim: int) -> Tensor:
        it = self._layout
        bytes_per_block = it.block_size * heads * dim * self._dtype.itemsize
        arena = self._arenas.slabs(it.num_blocks * bytes_per_block)
        self._tensors.append((arena, it.extent_blocks * bytes_per_block))
        return arena.tensor(0, (it.num_blocks, it.block_size, heads, dim), self._dtype)

    # -- BlockMemory, for the engine -----------------------------------------------------------

    @property
    def extent_blocks(self) -> int:
        return self._layout.extent_blocks

    def num_obtainable(self) -> int:
        return 0 if self._is_refused else max(0, self._share.within_reach // self._layout.extent_bytes)

    def num_left(self) -> int:
        return self._share.left // self._layout.extent_bytes if self._share.are_claimed else len(self._there)

    @property
    def _is_refused(self) -> bool:
        return time.monotonic() - self._refused_at < _AGAIN_S

    def take(self, extent: Extent, unused_since: float) -> bool:
        needed = sum(arena.pages_to_map(*place) * arena.page_bytes for arena, place in self._places(extent))
        if self._is_refused or not self._share.make_room(needed, unused_since):
            return False
        self._there.add(extent)
        with self._arenas.deferred() as pages:
            for arena, place in self._places(extent):
                self._share.take(arena.map(*place) * arena.page_bytes)
        try:
            self._do(pages)
        except ArenaError as error:
            self.give_back(extent)
            self._refused_at = time.monotonic()  # somebody else has the memory
            log.warning("the KV cache stays at %s bytes for now: %s", f"{self._share.used:,}", error)
            return False
        return True

    def give_back(self, extent: Extent) -> None:
        self._there.remove(extent)
        with self._arenas.deferred() as pages:
            for arena, place in self._places(extent):
                self._share.give_back(arena.unmap(*place) * arena.page_bytes)
        self._do(pages)

    def _places(self, extent: Extent) -> list[tuple[Arena, tuple[int, int]]]:
        return [(arena, (extent * size, size)) for arena, size in self._tensors]

    def check(self, there: Collection[Extent]) -> None:
        assert self._there == set(there)
        for arena, size in self._tensors:
            arena.check([(extent * size, size) for extent in self._there])
        assert self._share.used == sum(arena.num_mapped_pages * arena.page_bytes for arena, _ in self._tensors)


class IdleBlocks:
    """A pool's idle extents, as the budget sees them. least_bytes: that come free with one."""

    def __init__(self, pool: "IdleExtents", least_bytes: int) -> None:
        self._pool, self._least_bytes = pool, least_bytes

    def num_bytes(self) -> int:
        return self._pool.num_idle_extents * self._least_bytes

    def unused_since(self) -> float | None:
        return self._pool.idle_since()

    def give_up(self) -> None:
        self._pool.give_up()


class IdleExtents(Protocol):
    """What is asked of a BlockPool."""

    @property
    def num_idle_extents(self) -> int: ...

    def idle_since(self) -> float | None: ...

    def give_up(self) -> None: ...
