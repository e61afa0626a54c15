"""Adapter bytes from disk to their places, off the step loop."""

import json
import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from adapters_store.parts import SourceFile, TensorRef

Places = Sequence[tuple[TensorRef, Tensor]]
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TransferError(Exception):
    """The adapter's files could not be read as they were verified."""


class Transfer:
    """One adapter's copy. `done` turns true when it is over; `error` says why it failed, if it did.

    Files are read, not mapped: a file that is cut short while mapped would kill the process with SIGBUS.
    """

    def __init__(self, directory: Path, files: Sequence[SourceFile], places: Places) -> None:
        self._directory = directory
        self._files = files
        self._places = places
        self._over = threading.Event()
        self.error: str | None = None

    @property
    def done(self) -> bool:
        return self._over.is_set()

    def run(self) -> None:
        try:
            for file in self._files:
                self._copy_from(file)
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
                    raw = _read(file, begin + start, end - start)
                    place.copy_(torch.frombuffer(raw, dtype=_DTYPES[tensor.dtype]).view(tensor.shape))
            _require_unchanged(file, source)


def _read(file: BinaryIO, offset: int, size: int) -> bytearray:
    """Exactly `size` bytes at `offset`."""
    raw = bytearray(size)
    view = memoryview(raw)
    while view:
        count = os.preadv(file.fileno(), [view], offset)
        if count == 0:
            raise TransferError("it ends before its data")
        view, offset = view[count:], offset + count
    return raw


def _require_unchanged(file: BinaryIO, source: SourceFile) -> None:
    status = os.fstat(file.fileno())
    if (status.st_size, status.st_mtime_ns) != (source.size, source.mtime_ns):
        raise TransferError(f"{source.file} changed after it was registered; register the adapter again")


class TransferThread:
    """Runs transfers one after another, in order; the step loop only looks whether they are done."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Transfer] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="adapter-transfer", daemon=True)
        self._thread.start()

    def start(self, transfer: Transfer) -> None:
        self._queue.put(transfer)

    def _run(self) -> None:
        while True:
            self._queue.get().run()
