"""Files of adapters in host memory, between disk and device: read and hashed once, then copied as often as they return.

Memory is one set of chunks of one size, made when first needed and used again and again, so that nothing is allocated
for an adapter and nothing is left between two. All that is decided here is decided on the thread of the step loop, and
nothing here touches memory: what is in the chunks is the loading thread's (sources.py, transfer.py).

What is there was hashed while it was read from disk, and counts as whole only if that was what had been verified. Since
then only this protects it: nobody writes to a chunk that a copy has, and a chunk goes to another copy when no job is
left that reads or fills the one that had it. It is not hashed again, as the system's page cache is not: a bit that
flips in memory is the memory's to correct. The check for finite values behind every copy to the device finds only what
makes them infinite.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from adapters_store.parts import SourceFile

if TYPE_CHECKING:
    from torch import Tensor

_ALIGN = 64  # where a file begins within its copy: what is aligned in the file is aligned here


class ChunkMemory(Protocol):
    """Host memory in `num_chunks` pieces of `chunk_bytes` (chunks.py)."""

    chunk_bytes: int
    num_chunks: int

    def chunk(self, index: int) -> "Tensor":
        """[chunk_bytes] uint8, always the same for an index. Made when it is first asked for, on the loading thread.
        Raises ArenaError where there is no memory."""


class Job(Protocol):
    """Something that reads or fills a copy."""

    @property
    def done(self) -> bool:
        """Whether it has stopped doing so."""


class CachedFiles:
    """All files of one adapter, one behind the other, from the start of its first chunk on."""

    def __init__(self, revision: str, files: Sequence[SourceFile], chunks: Sequence[int], memory: ChunkMemory) -> None:
        self.revision, self.files, self.chunks, self.memory = revision, tuple(files), tuple(chunks), memory
        self.starts = _starts(files)[:-1]  # of each file, in bytes
        self.is_whole = False  # read to the end, and as it was verified: set by the loading thread, once
        self.is_dropped = False  # set by the step loop: it need not be filled any further
        self.filling: Iterator[None] | None = None  # the loading thread's: how far it has been filled (sources.py)
        self._jobs: list[Job] = []

    @property
    def num_bytes(self) -> int:
        return len(self.chunks) * self.memory.chunk_bytes

    def used_by(self, job: Job) -> None:
        """Its chunks are not given to another before this is done. On the step loop, before the job is started."""
        self._jobs.append(job)

    def is_busy(self) -> bool:
        self._jobs = [job for job in self._jobs if not job.done]
        return bool(self._jobs)

    def is_of(self, files: Sequence[SourceFile]) -> bool:
        """Whether these files, wherever they lie, are those that are here."""
        return _identity(self.files) == _identity(files)


class HostCache:
    """The least recently used copies that no job needs give way to others. All of the memory is its own."""

    def __init__(self, memory: ChunkMemory) -> None:
        self._memory, self._num_chunks = memory, memory.num_chunks
        # taken from the end, the lowest first: what is made on demand stays as little as was ever used at once
        self._free = list(range(self._num_chunks - 1, -1, -1))
        self._copies: dict[str, CachedFiles] = {}  # by revision, the least recently used first
        self._unfilled: dict[str, CachedFiles] = {}  # of these, those that were not whole when last looked at
        self._leaving: list[CachedFiles] = []  # dropped, and still needed by jobs
        self._dropped: list[str] = []

    def find(self, revision: str, files: Sequence[SourceFile]) -> CachedFiles | None:
        """A whole copy of these files. That counts as a use."""
        copy = self._current(revision, files)
        return copy if copy is not None and copy.is_whole else None

    def reserve(self, revision: str, files: Sequence[SourceFile]) -> CachedFiles | None:
        """The copy that there is, whole or being filled; else room for one, which a job of the caller's will fill.

        None where it does not fit, even if all gave way that can; then none does.
        """
        copy = self._current(revision, files)
        if copy is not None:
            return copy
        self._sweep()
        num_chunks = -(-_starts(files)[-1] // self._memory.chunk_bytes)
        victims = self._victims(num_chunks - len(self._free))
        if victims is None:
            return None
        for victim in victims:
            self._drop(victim)
        chunks = [self._free.pop() for _ in range(num_chunks)]
        copy = self._copies[revision] = self._unfilled[revision] = CachedFiles(revision, files, chunks, self._memory)
        return copy

    def discard(self, revision: str) -> None:
        """Nobody will ask for it. While jobs fill or read it, its room waits for them."""
        copy = self._copies.get(revision)
        if copy is not None:
            self._drop(copy, is_told=False)

    def take_dropped(self) -> list[str]:
        """Revisions of whole copies that gave way since the last call, but for those discarded."""
        dropped, self._dropped = self._dropped, []
        return dropped

    @property
    def num_bytes(self) -> int:
        """In use, also by what is leaving."""
        return (self._num_chunks - len(self._free)) * self._memory.chunk_bytes

    def bytes_of(self, revision: str) -> int:
        copy = self._copies.get(revision)
        return 0 if copy is None else copy.num_bytes

    def check(self) -> None:
        copies = [*self._copies.values(), *self._leaving]
        chunks = [*self._free, *(chunk for copy in copies for chunk in copy.chunks)]
        assert sorted(chunks) == list(range(self._num_chunks))
        assert all(revision == copy.revision for revision, copy in self._copies.items())
        assert all(copy.is_dropped == (copy in self._leaving) for copy in copies)
        assert all(self._copies[revision] is copy for revision, copy in self._unfilled.items())
        assert all(copy.is_whole or revision in self._unfilled for revision, copy in self._copies.items())

    def _current(self, revision: str, files: Sequence[SourceFile]) -> CachedFiles | None:
        """The copy of these files, used just now; one that is of others, or that nobody fills any more, is dropped."""
        copy = self._copies.pop(revision, None)
        if copy is None:
            return None
        self._copies[revision] = copy
        # asked in this order: a job may end between the two, and has filled it then
        if copy.is_of(files) and (copy.is_busy() or copy.is_whole):
            return copy
        self._drop(copy)
        return None

    def _sweep(self) -> None:
        """Take back what jobs were still busy with, and what they ended without filling."""
        leaving, self._leaving = self._leaving, []
        for copy in leaving:
            self._give_back(copy)
        for copy in tuple(self._unfilled.values()):
            if not copy.is_busy() and not copy.is_whole:
                self._drop(copy)
            elif copy.is_whole:
                del self._unfilled[copy.revision]

    def _victims(self, num_chunks: int) -> list[CachedFiles] | None:
        """Copies with so many chunks that may give way, or None if there are not enough."""
        victims: list[CachedFiles] = []
        for copy in self._copies.values():
            if num_chunks <= 0:
                break
            if copy.is_whole and not copy.is_busy():
                victims.append(copy)
                num_chunks -= len(copy.chunks)
        return victims if num_chunks <= 0 else None

    def _drop(self, copy: CachedFiles, is_told: bool = True) -> None:
        del self._copies[copy.revision]
        self._unfilled.pop(copy.revision, None)
        if copy.is_whole and is_told:
            self._dropped.append(copy.revision)
        copy.is_dropped = True
        self._give_back(copy)

    def _give_back(self, copy: CachedFiles) -> None:
        if copy.is_busy():
            self._leaving.append(copy)
        else:
            self._free += reversed(copy.chunks)


def _starts(files: Sequence[SourceFile]) -> list[int]:
    """Where each file begins in a copy, and where the copy ends."""
    starts = [0]
    for file in files:
        starts.append(starts[-1] + -(-file.size // _ALIGN) * _ALIGN)
    return starts


def _identity(files: Sequence[SourceFile]) -> list[tuple[str, int, str]]:
    return [(file.file, file.size, file.sha256) for file in files]
