"""Adapter bytes from disk to their places, off the step loop."""

import queue
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from adapters_store.parts import SourceFile, TensorRef

Places = Sequence[tuple[TensorRef, Tensor]]


class TransferError(Exception):
    """The adapter's files could not be read as they were verified."""


class Transfer:
    """One adapter's copy. `done` turns true when it is over; `error` says why it failed, if it did."""

    def __init__(self, directory: Path, files: Sequence[SourceFile], places: Places) -> None:
        self._directory = directory
        self._files = files
        self._places = places
        self._over = threading.Event()
        self.error: Exception | None = None

    @property
    def done(self) -> bool:
        return self._over.is_set()

    def run(self) -> None:
        try:
            for file in self._files:
                self._copy_from(file)
        except Exception as error:  # whatever goes wrong with a file is this adapter's failure, not the engine's
            self.error = error
        finally:
            self._over.set()

    def _copy_from(self, file: SourceFile) -> None:
        path = self._directory / file.file
        status = path.stat()
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            raise TransferError(f"{file.file} changed after it was registered; register the adapter again")
        with safe_open(path, framework="pt") as tensors, torch.inference_mode():
            for tensor, place in self._places:
                if tensor.file == file.file:
                    place.copy_(tensors.get_tensor(tensor.key))


class TransferThread:
    """Runs transfers one after another, in order; the step loop only looks whether they are done."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="adapter-transfer", daemon=True)
        self._thread.start()

    def start(self, transfer: Transfer) -> None:
        self._queue.put(transfer)

    def stop(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (transfer := self._queue.get()) is not None:
            transfer.run()
