"""Pages of the host's memory.

reserve   mmap(PROT_NONE, NORESERVE)     addresses only, nothing resident
map       mprotect(READ | WRITE)         a page becomes resident, and zero, when first written
unmap     madvise(DONTNEED), PROT_NONE   the page goes back at once; a stray read faults instead of lying
"""

import ctypes
import mmap
import os
from collections.abc import Callable

import torch

from server.weights.arena import ArenaError, VirtualArenas, log

_PROT_NONE, _PROT_READ_WRITE = 0, 3
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x02, 0x20, 0x4000
_MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 4, 14, 15
HUGE_PAGE_BYTES = 2 << 20
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class HostPages:
    """Of the system's size, or huge ones: fewer faults and fewer misses for what is large and read as a whole."""

    device = torch.device("cpu")

    def __init__(self, page_bytes: int = mmap.PAGESIZE) -> None:
        assert page_bytes in (mmap.PAGESIZE, HUGE_PAGE_BYTES)
        self.page_bytes = page_bytes

    def reserve(self, num_bytes: int) -> int:
        flags = _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
        beyond = self.page_bytes - mmap.PAGESIZE  # so that a page can begin where one of this size may
        start: int = _libc.mmap(None, num_bytes + beyond, _PROT_NONE, flags, -1, 0)
        if start == _MAP_FAILED:
            raise ArenaError(f"cannot reserve {num_bytes / 2**40:.2f} TiB of addresses ({_reason()})")
        address = -(-start // self.page_bytes) * self.page_bytes
        for left, size in ((start, address - start), (address + num_bytes, start + beyond - address)):
            if size:
                self.release(left, size)
        # else a huge page may be mapped where nobody asked for one
        is_huge = self.page_bytes == HUGE_PAGE_BYTES
        _libc.madvise(address, num_bytes, _MADV_HUGEPAGE if is_huge else _MADV_NOHUGEPAGE)
        return address

    def release(self, address: int, num_bytes: int) -> None:
        if _libc.munmap(address, num_bytes) != 0:
            log.error("munmap of %s bytes failed: %s", f"{num_bytes:,}", _reason())

    def map(self, address: int, num_bytes: int) -> None:
        _call("mprotect", address, num_bytes, _PROT_READ_WRITE)

    def unmap(self, address: int, num_bytes: int) -> None:
        _call("madvise", address, num_bytes, _MADV_DONTNEED)
        _call("mprotect", address, num_bytes, _PROT_NONE)

    def fence(self) -> Callable[[], None]:
        return _nothing_to_wait_for  # the host computes before it goes on


def host_arenas(page_bytes: int = mmap.PAGESIZE) -> VirtualArenas:
    return VirtualArenas(HostPages(page_bytes))


def _nothing_to_wait_for() -> None:
    pass


def _call(name: str, address: int, num_bytes: int, argument: int) -> None:
    if getattr(_libc, name)(address, num_bytes, argument) != 0:
        raise ArenaError(f"{name} of {num_bytes:,} bytes failed: {_reason()}")


def _reason() -> str:
    return os.strerror(ctypes.get_errno())
