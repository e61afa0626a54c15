"""Adapter bytes from disk to their places, off the step loop."""

import hashlib
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from adapters_store.errors import clean
from adapters_store.files import open_resolved, read_exactly
from adapters_store.parts import SourceFile, TensorRef
from server.weights.arena import PageWork, log
from server.weights.staging import CopyRun

Place = tuple[TensorRef, Tensor]
Derive = Callable[[], None]
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK_BYTES = 1 << 20


class TransferError(Exception):
    """The adapter's files are not as they were verified."""


class Job(Protocol):
    """What the transfer thread does, one after another: transfers, and the page work of evictions."""

    def run(self) -> None: ...


class Transfer:
    """One adapter's copy. `done` turns true when it is over; `error` says why it failed, if it did.

    Its pages are mapped first, by the thread that runs it. Files are read, not mapped: a file that is cut short while
    mapped would kill the process with SIGBUS. They are hashed as they are read: if that is not what was
    verified the transfer fails, and its places, which nobody looks at yet, are never looked at.

    `cleared` become zero before anything is copied: what of them no place lies in stays so. `derive`: what is computed
    of the places when all are filled (from the base's weights, say). Both on this thread and on the copies' stream, so
    that the step loop never does it.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        places: Iterable[Place],
        pages: PageWork,
        copies: CopyRun,
        cleared: Sequence[Tensor] = (),
        derive: Sequence[Derive] = (),
    ) -> None:
        self._files, self._places, self._pages = files, places, pages
        self._copies, self._cleared, self._derive = copies, cleared, derive
        self._over = threading.Event()
        self.error: str | None = None

    @property
    def done(self) -> bool:
        """Whether nothing is read, mapped or copied any more: only then may its room be used or given back."""
        return self._over.is_set() and self._copies.is_complete()

    def join(self) -> None:
        """Let kernels that are launched from now on read what was copied. Call it when `done`."""
        self._copies.join()

    def run(self) -> None:
        try:
            try:
                by_file = self._by_file()
                self._pages.run()
                with torch.inference_mode():
                    for tensor in self._cleared:
                        self._copies.compute(tensor.zero_)
                    for file in self._files:
                        self._copy_from(file, by_file.get(file.file, {}))
                    for step in self._derive:
                        self._copies.compute(step)
            finally:
                self._copies.end()
        except OSError as error:  # its text would show the path
            self.error = error.strerror or "it cannot be read"
        except BaseException as error:  # whatever else goes wrong is this adapter's failure, not the engine's
            self.error = str(error) or type(error).__name__
        finally:
            self._over.set()

    def _by_file(self) -> dict[str, dict[int, list[Place]]]:
        """Places by file, and by where their bytes begin. One that no file fills would be served as it was found."""
        by_file: dict[str, dict[int, list[Place]]] = {}
        for tensor, place in self._places:
            by_file.setdefault(tensor.file, {}).setdefault(tensor.offset, []).append((tensor, place))
        missing = sorted(set(by_file) - {file.file for file in self._files})
        if missing:
            raise TransferError(f"{clean(missing[0], 200)} is not among the adapter's files; register it again")
        return by_file

    def _copy_from(self, source: SourceFile, stored: dict[int, list[Place]]) -> None:
        """Every byte of the file once, in order: those of tensors to their places, the rest for the hash."""
        descriptor = open_resolved(source.path)
        try:
            if os.fstat(descriptor).st_size != source.size:
                raise _changed(source)
            file = _HashedFile(descriptor)
            for offset in sorted(stored):
                file.skip_to(offset)
                self._copy(file, offset, stored[offset])
            file.skip_to(source.size)
        finally:
            os.close(descriptor)
        if file.hexdigest() != source.sha256:
            raise _changed(source)

    def _copy(self, file: "_HashedFile", offset: int, places: Sequence[Place]) -> None:
        """What is stored at `offset`: as it is to its place, or to several, whole or in blocks."""
        first, place = places[0]
        if len(places) == 1 and first.cut_from is None:
            self._copies.put(partial(_fill, file, offset), first.num_bytes, _DTYPES[first.dtype], place)
            return
        dtype = _DTYPES[first.dtype]
        raw = bytearray(first.stored_elements * dtype.itemsize)
        file.read_into(memoryview(raw))
        stored = torch.frombuffer(raw, dtype=dtype)
        for tensor, place in places:
            assert tensor.stored_elements == first.stored_elements and tensor.dtype == first.dtype
            bytes_of = _block(stored, tensor).contiguous().view(torch.uint8).numpy().reshape(-1).data
            self._copies.put(partial(_hand_over, bytes_of), tensor.num_bytes, dtype, place)


def _block(stored: Tensor, tensor: TensorRef) -> Tensor:
    """The tensor as a view of what lies at its offset, [stored_elements]."""
    if tensor.cut_from is None:
        return stored
    it = tensor.cut_from
    whole = stored.view(it.shape).permute(it.order or tuple(range(len(it.shape))))
    return whole[tuple(slice(start, start + size) for start, size in zip(it.start, tensor.shape, strict=True))]


class _HashedFile:
    """A file that is read from its beginning to its end, and hashed on the way. hashlib lets other threads run."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._digest, self._position = descriptor, hashlib.sha256(), 0

    def read_into(self, into: memoryview) -> None:
        read_exactly(self._descriptor, self._position, into)
        self._digest.update(into)
        self._position += len(into)

    def skip_to(self, offset: int) -> None:
        while self._position < offset:
            self.read_into(memoryview(bytearray(min(_CHUNK_BYTES, offset - self._position))))
        assert self._position == offset

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _fill(file: _HashedFile, start: int, into: memoryview, offset: int) -> None:
    """As staging.Read: it asks for a tensor's bytes in order, so no seek is needed."""
    file.skip_to(start + offset)
    file.read_into(into)


def _hand_over(source: memoryview, into: memoryview, offset: int) -> None:
    """As staging.Read, of what is in memory."""
    into[:] = source[offset : offset + len(into)]


def _changed(source: SourceFile) -> TransferError:
    return TransferError(f"{clean(source.file, 200)} changed after it was registered; register the adapter again")


class TransferThread:
    """Runs jobs one after another, in order; the step loop only looks whether transfers are done.

    The order is what makes reuse safe: pages are given back before they are mapped for the next adapter.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="adapter-transfer", daemon=True)
        self._thread.start()

    def start(self, job: Job) -> None:
        self._queue.put(job)

    def _run(self) -> None:
        while True:
            try:
                self._queue.get().run()
            except Exception:  # a transfer keeps its own errors; the others must not wait for ever for one job's
                log.exception("a job of the transfer thread failed")
