"""The bytes of an adapter's files: from disk, hashed as they are read, or from the host's cache.

Files are read, not mapped: a file that is cut short while mapped would kill the process with SIGBUS. Whoever reads lets
go of the interpreter meanwhile: bytes are read, hashed and copied in pieces that are large enough for that, and small
enough to be in the processor's cache still when they are hashed.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from torch import Tensor

from adapters_store.errors import clean
from adapters_store.files import open_resolved, read_exactly
from adapters_store.parts import SourceFile
from server.weights.failures import UnusableAdapter
from server.weights.host_cache import CachedFiles

_PIECE_BYTES = 1 << 20


class ChangedFile(UnusableAdapter):
    """The file is not the one that was verified."""

    def __init__(self, file: SourceFile) -> None:
        super().__init__(f"{clean(file.file, 200)} changed after it was registered; register the adapter again")


class FileBytes(Protocol):
    """The bytes of one file. They are asked for from its beginning to its end, each at most once."""

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` with what begins at this offset."""

    def lasting(self, offset: int, num_bytes: int) -> Iterator[Tensor] | None:
        """The same as pieces [bytes] uint8 of memory that stays as it is until the job is done. None: read it."""


class DiskFile:
    """A file that is read once, in order, and hashed on the way."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._digest, self._position = descriptor, hashlib.sha256(), 0

    def read(self, offset: int, into: memoryview) -> None:
        self.skip_to(offset)
        for begin in range(0, len(into), _PIECE_BYTES):
            piece = into[begin : begin + _PIECE_BYTES]
            read_exactly(self._descriptor, self._position, piece)
            self._digest.update(piece)
            self._position += len(piece)

    def lasting(self, offset: int, num_bytes: int) -> None:
        return None

    def skip_to(self, offset: int) -> None:
        """What lies between is read too, for the hash."""
        scrap = memoryview(bytearray(min(_PIECE_BYTES, offset - self._position)))
        while self._position < offset:
            self.read(self._position, scrap[: offset - self._position])
        assert self._position == offset

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


@contextlib.contextmanager
def verified(file: SourceFile) -> Iterator[DiskFile]:
    """Open it for one reading; at the end, what was not asked for is read too, and all of it must be what was verified.
    Raises OSError, EOFError where it is cut short meanwhile, or ChangedFile."""
    descriptor = open_resolved(file.path)
    try:
        if os.fstat(descriptor).st_size != file.size:
            raise ChangedFile(file)
        it = DiskFile(descriptor)
        yield it
        it.skip_to(file.size)
    finally:
        os.close(descriptor)
    if it.hexdigest() != file.sha256:
        raise ChangedFile(file)


class CachedFile:
    """A file of a whole copy."""

    def __init__(self, copy: CachedFiles, number: int) -> None:
        self._copy, self._start = copy, copy.starts[number]

    def read(self, offset: int, into: memoryview) -> None:
        target, done = np.frombuffer(into, np.uint8), 0
        for piece in self.lasting(offset, len(into)):
            np.copyto(target[done : done + len(piece)], piece.numpy())  # unlike a slice, it lets other threads run
            done += len(piece)

    def lasting(self, offset: int, num_bytes: int) -> Iterator[Tensor]:
        return pieces_of(self._copy, self._start + offset, num_bytes)


def pieces_of(copy: CachedFiles, begin: int, num_bytes: int) -> Iterator[Tensor]:
    """What lies in a copy from this byte on, chunk by chunk."""
    size, end = copy.memory.chunk_bytes, begin + num_bytes
    while begin < end:
        number, within = divmod(begin, size)
        count = min(size - within, end - begin)
        yield copy.memory.chunk(copy.chunks[number])[within : within + count]
        begin += count


def fill(copy: CachedFiles) -> Iterator[None]:
    """Read a copy's files into it, a piece a step, until it is whole; goes on where another job has stopped.

    Raises what `verified` does, or ArenaError where there is no memory for its chunks; a later one then begins anew.
    """
    while not copy.is_whole:
        copy.filling = steps = copy.filling or _fill(copy)
        try:
            next(steps, None)
        except BaseException:
            copy.filling = None
            raise
        yield
    copy.filling = None


def _fill(copy: CachedFiles) -> Iterator[None]:
    for file, start in zip(copy.files, copy.starts, strict=True):
        with verified(file) as source:
            offset = 0
            for piece in pieces_of(copy, start, file.size):
                source.read(offset, piece.numpy().data)
                offset += len(piece)
                yield
    copy.is_whole = True
