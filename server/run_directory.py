"""A directory for what lives as long as the server: its engine's socket, and adapters where there is no store.

A server that is killed cannot remove its own, so each start removes those whose server has ended: their lock is free.
"""

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from adapters_store.errors import StoreLocked
from adapters_store.store.store import DATABASE, lock_directory
from server.errors import StartupError

_PREFIX = "heddle-run-"
_OURS = re.compile(rf"{_PREFIX}[a-z0-9_]{{8}}")  # as mkdtemp makes it; a store that somebody keeps there is none


class RunDirectory:
    """A context manager; readable by its owner alone. Raises StartupError where there can be none."""

    def __init__(self) -> None:
        try:
            _sweep()
            self.path, self._lock = _made()
        except OSError as error:
            raise StartupError(f"no directory can be made below {tempfile.gettempdir()!r} ({error.strerror})") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _made() -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        try:
            return path, lock_directory(path)
        except (FileNotFoundError, StoreLocked):  # another server, which sweeps, was quicker
            continue


def _sweep() -> None:
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if not _OURS.fullmatch(directory.name) or (directory / DATABASE).exists():
            continue  # a store that somebody put there has a lock too
        if not (directory / "lock").is_file():  # another's, or just being made
            continue
        with suppress(OSError, StoreLocked):
            lock = lock_directory(directory)
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)
