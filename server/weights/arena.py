"""Virtual memory that looks like one ordinary tensor, with physical pages only under the parts in use.

Addresses never change, so views, pointers and captured CUDA graphs stay valid while adapters come and go. Ranges that
are not multiples of a page share their edge pages, which are counted (arXiv 2508.17624, section 4.2). What a page is,
and how one comes and goes, is a `Pages`: the host's (host_arena.py) or a GPU's (cuda_arena.py).

Counting and doing are apart. `map` and `unmap` count at once, on the thread of the step loop, so that the page budget
is exact and deterministic. The calls to the system, which take their time, can be left to another thread
(`VirtualArenas.deferred`), which does them in the same order. It keeps counts of its own: what is so, where the first
count what has been asked for. They differ by what is still to be done and by what has failed.
"""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from server.weights.dlpack import bytes_at
from server.weights.page_counts import PageCounts
from server.weights.page_pool import PagePool

log = logging.getLogger("heddle.weights")


class ArenaError(Exception):
    """The system refused; the message says which call, what was asked for, and what there is."""


class VirtualMemoryUnsupported(ArenaError):
    """This device, its driver or this installation has no virtual memory of its own."""


class Pages(Protocol):
    """Physical pages of one device. Addresses and sizes are multiples of a page."""

    page_bytes: int
    device: torch.device

    def reserve(self, num_bytes: int) -> int:
        """The address of so many bytes that nothing is mapped to."""

    def release(self, address: int, num_bytes: int) -> None:
        """Undo a reserve and every map in it. Does not raise."""

    def map(self, address: int, num_bytes: int) -> None:
        """Make a run of pages usable, with undefined contents. All of it, or it raises ArenaError and none is."""

    def unmap(self, address: int, num_bytes: int) -> None:
        """Give a run of pages back. Where it raises, what it could not give back may be mapped again all the same."""

    def fence(self) -> Callable[[], None]:
        """Returns a call that waits until everything is over that the device has been told to do by now."""


class PageWork:
    """Maps and unmaps that have been counted and not yet been done."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def add(self, step: Callable[[], None]) -> None:
        self._steps.append(step)

    def run(self) -> None:
        """Do them, in order, on one thread for all arenas. Raises ArenaError where a map fails."""
        for step in self._steps:
            step()


class Arena(Protocol):
    """What tables know of one. Offsets and sizes are in bytes; ranges that are mapped do not overlap."""

    page_bytes: int

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view; it may span parts that are not mapped, and faults if those are touched."""

    def pages_to_map(self, offset: int, size: int) -> int:
        """How many pages of the budget mapping this range would take."""

    def pages_of(self, size: int) -> int:
        """How many it takes of a range that begins on a page."""

    def map(self, offset: int, size: int) -> int:
        """Make a range usable, with undefined contents; returns the pages added."""

    def unmap(self, offset: int, size: int) -> int:
        """Undo one map of exactly this range; returns the pages that nobody uses any more.

        Called where kernels are launched: those that were may still read the range, and it waits for them.
        """

    @property
    def num_mapped_pages(self) -> int: ...

    def check(self, ranges: list[tuple[int, int]]) -> None:
        """Recompute the counts from the ranges that are mapped."""

    def close(self) -> None:
        """Give everything back. No view may be used afterwards."""


class Arenas(Protocol):
    """Makes arenas of one kind (choice.py)."""

    page_bytes: int

    def stack(self, num_bytes: int, base_bytes: int, pool: PagePool) -> Arena:
        """For one tensor of which every part is addressed. Its first `base_bytes` are the base model's: no adapter's.

        `pool` is for a kind that takes the adapters' share for good.
        """

    def slabs(self, num_bytes: int) -> Arena:
        """For ranges that are never seen as one tensor."""

    def deferred(self) -> contextlib.AbstractContextManager[PageWork]:
        """Within, arenas only count; what they would have done is in the work."""


class VirtualArena:
    """`num_bytes` of reserved addresses, with pages under the mapped ranges. The addresses go with the last view."""

    def __init__(
        self, num_bytes: int, pages: Pages, do: Callable[[Callable[[], None]], None] = lambda it: it()
    ) -> None:
        self.num_bytes, self.page_bytes = num_bytes, pages.page_bytes
        self._memory, self._do = pages, do
        reserved = -(-num_bytes // self.page_bytes) * self.page_bytes
        self._base = pages.reserve(reserved)
        owner = _Addresses()
        self._give_back = weakref.finalize(owner, pages.release, self._base, reserved)
        self._give_back.atexit = False  # the process's end gives back more surely
        self._bytes = bytes_at(self._base, num_bytes, pages.device, owner)
        self._counted = PageCounts(num_bytes, self.page_bytes)
        # of the thread that maps
        self._backed = PageCounts(num_bytes, self.page_bytes)
        self._backed_ranges: set[tuple[int, int]] = set()

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = prod(shape) * dtype.itemsize
        return self._bytes[offset : offset + size].view(dtype).view(shape)

    def pages_to_map(self, offset: int, size: int) -> int:
        return len(self._counted.added_by(offset, size))

    def pages_of(self, size: int) -> int:
        return -(-size // self.page_bytes)

    def map(self, offset: int, size: int) -> int:
        added = self._counted.add(offset, size)
        try:
            self._do(partial(self._back, offset, size))
        except ArenaError:
            self._counted.remove(offset, size)
            raise
        return len(added)

    def unmap(self, offset: int, size: int) -> int:
        gone = self._counted.remove(offset, size)
        self._do(partial(self._unback, offset, size, self._memory.fence()))
        return len(gone)

    @property
    def num_mapped_pages(self) -> int:
        return self._counted.num_pages

    @property
    def num_backed_pages(self) -> int:
        """Pages that are there by now. Of the thread that maps; equal to those counted once its work is done."""
        return self._backed.num_pages

    def check(self, ranges: list[tuple[int, int]]) -> None:
        self._counted.check(ranges)

    def close(self) -> None:
        self._give_back()

    def _back(self, offset: int, size: int) -> None:
        # by what is there, not by what was counted: a neighbour that shares a page may have failed
        added = self._backed.added_by(offset, size)
        if added:
            self._memory.map(self._base + added.start * self.page_bytes, len(added) * self.page_bytes)
        self._backed.add(offset, size)
        self._backed_ranges.add((offset, size))

    def _unback(self, offset: int, size: int, wait: Callable[[], None]) -> None:
        if (offset, size) not in self._backed_ranges:
            return  # its map has failed
        self._backed_ranges.remove((offset, size))
        gone = self._backed.remove(offset, size)
        if not gone:
            return
        wait()
        try:
            self._memory.unmap(self._base + gone.start * self.page_bytes, len(gone) * self.page_bytes)
        except ArenaError as error:  # no request is waiting for this; the next map of the range uses what is left
            log.error("memory of an adapter could not be given back: %s", error)


class _Addresses:
    """Kept alive by the views of an arena."""


class VirtualArenas:
    """Arenas over the pages of one device."""

    def __init__(self, pages: Pages) -> None:
        self.page_bytes = pages.page_bytes
        self._pages = pages
        self._later: PageWork | None = None  # where arenas leave what they would do; None: they do it

    def stack(self, num_bytes: int, base_bytes: int, pool: PagePool) -> VirtualArena:
        return VirtualArena(num_bytes, self._pages, self._do)

    def slabs(self, num_bytes: int) -> VirtualArena:
        return VirtualArena(num_bytes, self._pages, self._do)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[PageWork]:
        assert self._later is None
        self._later = work = PageWork()
        try:
            yield work
        finally:
            self._later = None

    def _do(self, step: Callable[[], None]) -> None:
        if self._later is None:
            step()
        else:
            self._later.add(step)
