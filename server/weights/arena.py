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
from collections.abc import Iterator
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
    """`num_bytes` of reserved addresses. Offsets and sizes are in bytes. One thread maps; any may write what is mapped."""

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
        self._users: Counter[int] = Counter()  # of each mapped page: ranges that touch it

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view; it may span parts that are not mapped, and faults if those are touched."""
        count = prod(shape)
        return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=offset).view(shape)

    def pages_to_map(self, offset: int, size: int) -> int:
        """How many pages mapping this range would add."""
        return sum(page not in self._users for page in self._pages(offset, size))

    def map(self, offset: int, size: int) -> int:
        """Make a range usable, zeroed where it was not; returns the pages added."""
        pages = self._pages(offset, size)
        added = [page for page in pages if page not in self._users]
        for start, count in _runs(added):
            self._call("mprotect", start, count, _PROT_READ_WRITE)
        self._users.update(pages)
        return len(added)

    def unmap(self, offset: int, size: int) -> int:
        """Undo one map of exactly this range; returns the pages that nobody uses any more."""
        pages = self._pages(offset, size)
        self._users.subtract(pages)
        gone = [page for page in pages if self._users[page] == 0]
        for page in gone:
            del self._users[page]
        for start, count in _runs(gone):
            self._call("madvise", start, count, _MADV_DONTNEED)
            self._call("mprotect", start, count, _PROT_NONE)
        return len(gone)

    @property
    def num_mapped_pages(self) -> int:
        return len(self._users)

    def check(self, ranges: list[tuple[int, int]]) -> None:
        """Recompute page counts from the ranges that are mapped."""
        assert self._users == Counter(page for offset, size in ranges for page in self._pages(offset, size))

    def close(self) -> None:
        """Give the addresses back. No view may be used afterwards."""
        _libc.munmap(self._base, self._reserved)

    def _pages(self, offset: int, size: int) -> range:
        assert size > 0 and 0 <= offset and offset + size <= self.num_bytes
        return range(offset // self.page_bytes, -(-(offset + size) // self.page_bytes))

    def _call(self, name: str, page: int, count: int, argument: int) -> None:
        address, size = self._base + page * self.page_bytes, count * self.page_bytes
        if getattr(_libc, name)(address, size, argument) != 0:
            raise ArenaError(f"{name} of {size:,} bytes failed: {os.strerror(ctypes.get_errno())}")


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending pages as (first, count) of neighbours: one system call each."""
    start = 0
    for index in range(1, len(pages) + 1):
        if index == len(pages) or pages[index] != pages[index - 1] + 1:
            yield pages[start], index - start
            start = index
