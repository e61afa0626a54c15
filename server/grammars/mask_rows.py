"""Masks in memory that the engine and the process beside it share: a row for each request."""

import ctypes
import mmap
import os


class MaskRows:
    def __init__(self, file: int, num_rows: int, row_bytes: int) -> None:
        """file: descriptor of a memory file, which is kept open by whoever gave it."""
        self.num_rows, self.row_bytes = num_rows, row_bytes
        self._memory = mmap.mmap(file, num_rows * row_bytes)
        self._view = memoryview(self._memory)

    @staticmethod
    def new_file(num_rows: int, row_bytes: int) -> int:
        """A descriptor. Memory is taken as rows are written."""
        file = os.memfd_create("heddle-masks", os.MFD_CLOEXEC)
        os.ftruncate(file, num_rows * row_bytes)
        return file

    def row(self, index: int) -> memoryview:
        return self._view[index * self.row_bytes : (index + 1) * self.row_bytes]

    def address(self, index: int) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._memory)) + index * self.row_bytes


def row_bytes_of(vocab_size: int) -> int:
    """A bit a token, in 32-bit words."""
    return -(-vocab_size // 32) * 4
