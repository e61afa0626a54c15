"""A store: a directory that belongs to one base model and one server at a time.

lock             held by the server, or by a command, while it may write
server.json      where that server can be asked
catalog.sqlite   the catalogue and the log (journal.py)
blobs/           the files of adapters, by hash (blobs.py)
incoming/        what is being copied
uploads/         what clients are sending
reserve          room that is given up so that something can be deleted when the disk is full
"""

import fcntl
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from adapters_store.catalog import Change
from adapters_store.errors import StoreFailed, StoreFull, StoreLocked
from adapters_store.parts import SourceFile
from adapters_store.records import Content, LogLine, Weights
from adapters_store.store.blobs import Blobs, store_error
from adapters_store.store.journal import Journal, Loaded

DATABASE = "catalog.sqlite"
RESERVE_BYTES = 1 << 20  # more than a deletion writes
PLENTY_BYTES = 64 << 20


class Store:
    """Open with `open_store`. Changes are written by one thread at a time; whoever calls sees to that."""

    def __init__(self, directory: Path, lock: int, journal: Journal) -> None:
        self.directory, self.journal = directory, journal
        self.blobs = Blobs(directory)
        self._lock = lock
        self._passing = Journal(None)  # what is served and not persisted: the adapters that --adapters names

    @property
    def uploads(self) -> Path:
        return self.directory / "uploads"

    def load(self) -> Loaded:
        """What was written. Drops first what a server that ended in mid-change had not come to."""
        self.blobs.remove(self._unspoken_of(self.journal.forget(self.journal.unused())))
        return self.journal.load()

    def commit(self, change: Change, actor: str, new: tuple[Weights, Content] | None = None) -> None:
        """Write one change; `new` are weights that are not in the store yet. Raises StoreFull or StoreFailed."""
        if change.record is not None and not change.record.is_durable:
            self._passing.commit(change, actor, {new[0].revision: new} if new else {})
            return
        own = {new[0].revision: new} if new else {}
        for version in change.record.versions if change.record is not None else ():
            if version.revision not in own and not self.journal.has(version.revision):
                own[version.revision] = self._moved(version.revision)  # it was not meant to outlive us until now
        try:
            self.journal.commit(change, actor, own)
        except StoreFull:
            if change.action not in ("delete", "collect") or not self._give_up_reserve():
                raise
            self.journal.commit(change, actor, own)  # a deletion is written too, before it frees anything
        if change.action == "delete":
            self._passing.commit(change, actor, {})

    def forget(self, revisions: Sequence[str], brought: Sequence[str] = ()) -> int:
        """Drop weights that no name means, with the blobs that no other weights have; and of the blobs that were
        `brought` those that no weights have. Returns the bytes freed."""
        dropped = [self.blobs.named(it) for it in brought]
        if revisions:
            dropped += self.journal.forget(revisions) + self._passing.forget(revisions)
        freed = self.blobs.remove({it.sha256: it for it in self._unspoken_of(dropped)}.values())
        if dropped:
            self.keep_reserve()
        return freed

    def sweep(self) -> int:
        """Remove blobs that nothing speaks of. Returns the bytes freed. Not while an adapter is being verified."""
        try:
            return self.blobs.remove(self._unspoken_of(self.blobs.present()))
        except OSError as error:
            raise store_error(error) from None

    def package(self, revision: str) -> bytes:
        found = self.journal.package(revision) or self._passing.package(revision)
        if found is None:
            raise StoreFailed("the store has lost an adapter's description; register the adapter again")
        return found

    def content(self, revision: str) -> Content:
        found = self.journal.content(revision) or self._passing.content(revision)
        if found is None:
            raise StoreFailed("the store has lost an adapter's description; register the adapter again")
        return found

    def has(self, revision: str) -> bool:
        return self.journal.has(revision) or self._passing.has(revision)

    def log(self, after: int = 0, limit: int = 100) -> list[LogLine]:
        return self.journal.log(after, limit)

    def identify(self, values: Mapping[str, bytes]) -> None:
        self.journal.identify(values)

    def close(self) -> None:
        self.journal.close()
        self._passing.close()
        os.close(self._lock)

    def keep_reserve(self) -> None:
        """Where the disk has plenty of room, and else not."""
        path = self.directory / "reserve"
        with suppress(OSError):
            if not path.exists() and shutil.disk_usage(self.directory).free > PLENTY_BYTES:
                with path.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)

    def _give_up_reserve(self) -> bool:
        """Whether there was one."""
        try:
            os.unlink(self.directory / "reserve")
        except OSError:
            return False
        return True

    def _unspoken_of(self, files: Iterable[SourceFile]) -> list[SourceFile]:
        return [
            it for it in files if not self.journal.is_blob_used(it.sha256) and not self._passing.is_blob_used(it.sha256)
        ]

    def _moved(self, revision: str) -> tuple[Weights, Content]:
        weights = next(it for it in self._passing.load().weights if it.revision == revision)
        return weights, self.content(revision)


def open_store(directory: Path) -> Store:
    """Raises StoreLocked, StoreFull or StoreFailed."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = lock_directory(directory)
    except OSError as error:
        raise store_error(error) from None
    try:
        blobs = Blobs(directory)
        blobs.prepare()
        store = Store(directory, lock, Journal(directory / DATABASE))
        store.keep_reserve()
        return store
    except OSError as error:
        os.close(lock)
        raise store_error(error) from None
    except BaseException:
        os.close(lock)
        raise


def check_is_store(directory: Path) -> None:
    """For who would not make one. Raises StoreFailed."""
    try:
        is_there = (directory / DATABASE).is_file()
    except OSError as error:
        raise StoreFailed(f"{str(directory)!r} cannot be read: {error.strerror}; see that you may read it") from None
    if not is_there:
        raise StoreFailed(
            f"{str(directory)!r} holds no store: name the directory of one (--store), or start a server, which makes it"
        )


def lock_directory(directory: Path) -> int:
    """A descriptor that holds the lock until it is closed, or its process ends. Raises StoreLocked and OSError."""
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StoreLocked("the store is in use by another server or command") from None
    return lock
