"""Virtual memory that looks like one ordinary tensor, with physical pages only under the parts in use.

    reserve   mmap(PROT_NONE, NORESERVE)     addresses only, nothing resident
    map       mprotect(READ | WRITE)         a page becomes resident when first written
    unmap     madvise(DONTNEED), PROT_NONE   the page goes back at once; a stray read faults instead of lying

Addresses never change, so views and pointers stay valid while adapters come and go. Ranges that are not multiples of
a page share their edge pages, which are counted. This is the host's form of what CUDA's virtual-memory API does with
2 MiB granules (arXiv 2508.17624, section 4.2).
"""

import ctypes
import mmap
import os
from collections import Counter
from math import prod

import torch
from torch import Tensor

_PROT_NONE, _PROT_READ_WRITE = 0, 3
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x02, 0x20, 0x4000
_MADV_DONTNEED, _MADV_NOHUGEPAGE = 4, 15
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class ArenaError(Exception):
    """The operating system refused; the message says what was asked for."""


class HostArena:
    """`num_bytes` of reserved addresses. Offsets and sizes are in bytes. One thread maps; any may write to what is."""

    page_bytes = mmap.PAGESIZE

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._reserved = -(-num_bytes // self.page_bytes) * self.page_bytes
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
        self._base: int = _libc.mmap(None, self._reserved, _PROT_NONE, flags, -1, 0)
        if self._base == _MAP_FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise ArenaError(f"cannot reserve {num_bytes / 2**40:.2f} TiB of addresses ({reason})")
        _libc.madvise(self._base, self._reserved, _MADV_NOHUGEPAGE)  # a huge page would map what nobody asked for
        self._bytes = (ctypes.c_uint8 * num_bytes).from_address(self._base)
        # Ranges do not overlap, so only the first and the last page of one can be another's too. Those are counted by
        # their users; the pages between are only summed, so a gigabyte costs no more bookkeeping than a kilobyte.
        self._edges: Counter[int] = Counter()
        self._num_inner = 0

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view; it may span parts that are not mapped, and faults if those are touched."""
        count = prod(shape)
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=offset).view(shape)

    def pages_to_map(self, offset: int, size: int) -> int:
        """How many pages mapping this range would add."""
        return len(self._sole(self._pages(offset, size), users=0))

    def map(self, offset: int, size: int) -> int:
        """Make a range usable, zeroed where it was not; returns the pages added."""
        pages = self._pages(offset, size)
        added = self._sole(pages, users=0)
        self._call("mprotect", added, _PROT_READ_WRITE)
        self._edges.update({pages[0], pages[-1]})
        self._num_inner += max(0, len(pages) - 2)
        return len(added)

    def unmap(self, offset: int, size: int) -> int:
        """Undo one map of exactly this range; returns the pages that nobody uses any more."""
        pages = self._pages(offset, size)
        gone = self._sole(pages, users=1)
        self._edges.subtract({pages[0], pages[-1]})
        self._edges += Counter()  # drops the zeros
        self._num_inner -= max(0, len(pages) - 2)
        self._call("madvise", gone, _MADV_DONTNEED)
        self._call("mprotect", gone, _PROT_NONE)
        return len(gone)

    @property
    def num_mapped_pages(self) -> int:
        return self._num_inner + len(self._edges)

    def check(self, ranges: list[tuple[int, int]]) -> None:
        """Recompute the counts from the ranges that are mapped."""
        pages = [self._pages(offset, size) for offset, size in ranges]
        assert self._edges == Counter(edge for it in pages for edge in {it[0], it[-1]})
        assert self._num_inner == sum(max(0, len(it) - 2) for it in pages)

    def close(self) -> None:
        """Give the addresses back. No view may be used afterwards."""
        _libc.munmap(self._base, self._reserved)

    def _pages(self, offset: int, size: int) -> range:
        assert size > 0 and 0 <= offset and offset + size <= self.num_bytes
        return range(offset // self.page_bytes, -(-(offset + size) // self.page_bytes))

    def _sole(self, pages: range, users: int) -> range:
        """`pages` without an edge that has more users than these."""
        start = pages.start + (self._edges[pages[0]] > users)
        stop = pages.stop - (self._edges[pages[-1]] > users)
        return range(start, max(start, stop))

    def _call(self, name: str, pages: range, argument: int) -> None:
        if not pages:
            return
        address, size = self._base + pages.start * self.page_bytes, len(pages) * self.page_bytes
        if getattr(_libc, name)(address, size, argument) != 0:
            raise ArenaError(f"{name} of {size:,} bytes failed: {os.strerror(ctypes.get_errno())}")
