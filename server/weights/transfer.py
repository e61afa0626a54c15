"""Adapter bytes from disk to their places, off the step loop."""

import json
import os
import queue
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from adapters_store.parts import SourceFile, TensorRef
from server.weights.arena import PageWork, log
from server.weights.staging import CopyRun, read_exactly

Places = Sequence[tuple[TensorRef, Tensor]]
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TransferError(Exception):
    """The adapter's files are not as they were verified."""


class Job(Protocol):
    """What the transfer thread does, one after another: transfers, and the page work of evictions."""

    def run(self) -> None: ...


class Transfer:
    """One adapter's copy. `done` turns true when it is over; `error` says why it failed, if it did.

    Its pages are mapped first, by the thread that runs it. Files are read, not mapped: a file that is cut short while
    mapped would kill the process with SIGBUS.
    """

    def __init__(
        self, directory: Path, files: Sequence[SourceFile], places: Places, pages: PageWork, copies: CopyRun
    ) -> None:
        self._directory = directory
        self._files = files
        self._places = places
        self._pages = pages
        self._copies = copies
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
                self._pages.run()
                for file in self._files:
                    self._copy_from(file)
            finally:
                self._copies.end()
        except OSError as error:  # its text would show the path
            self.error = error.strerror or "it cannot be read"
        except BaseException as error:  # whatever else goes wrong is this adapter's failure, not the engine's
            self.error = str(error) or type(error).__name__
        finally:
            self._over.set()

    def _copy_from(self, source: SourceFile) -> None:
        with (self._directory / source.file).open("rb", buffering=0) as file, torch.inference_mode():
            _require_unchanged(file, source)
            begin = 8 + int.from_bytes(_read(file, 0, 8), "little")
            header = json.loads(_read(file, 8, begin - 8))
            for tensor, place in self._places:
                if tensor.file == source.file:
                    start, end = header[tensor.key]["data_offsets"]
                    read = partial(_read_at, file, begin + start)
                    self._copies.put(read, end - start, _DTYPES[tensor.dtype], place)
            _require_unchanged(file, source)


def _read_at(file: BinaryIO, start: int, into: memoryview, offset: int) -> None:
    read_exactly(file.fileno(), start + offset, into)


def _read(file: BinaryIO, offset: int, size: int) -> bytearray:
    """Exactly `size` bytes at `offset`."""
    raw = bytearray(size)
    read_exactly(file.fileno(), offset, memoryview(raw))
    return raw


def _require_unchanged(file: BinaryIO, source: SourceFile) -> None:
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != (source.size, source.mtime_ns):
        raise TransferError(f"{source.file} changed after it was registered; register the adapter again")


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
