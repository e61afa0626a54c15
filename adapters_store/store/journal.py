"""The catalogue on disk: an SQLite database in which each change is one transaction.

WAL and synchronous=FULL: when `commit` returns the change is on the disk, and a reader never waits for a writer. One
connection writes, from whichever thread calls (one at a time); another reads, from the event loop.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from adapters_store.catalog import Change
from adapters_store.errors import AdapterError, StoreFailed, StoreFull, StoreUnfit, clean
from adapters_store.parts import SourceFile
from adapters_store.records import Alias, Content, LogLine, Record, Weights
from adapters_store.store.schema import check_version, migrate

_RECORDS = msgspec.msgpack.Decoder(Record)
_WEIGHTS = msgspec.msgpack.Decoder(Weights)
_ALIASES = msgspec.msgpack.Decoder(Alias)
_MAX_ACTOR, _MAX_DETAILS = 200, 1000
BUSY_S = 10.0  # a backup reads beside us


class Loaded(NamedTuple):
    records: list[Record]
    weights: list[Weights]
    aliases: list[Alias]


class Journal:
    def __init__(self, path: Path | None, read_only: bool = False) -> None:
        """`path` None: in memory, for what does not outlive the server. `read_only`: beside the server that writes it,
        and without a change to it. Raises StoreFailed, or StoreUnfit for what no store wrote."""
        if path is not None and read_only:
            with told("opened"):
                self._writer = self._reader = _connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
                check_version(self._reader)
            return
        with told("opened"):
            self._writer = _connect(":memory:" if path is None else str(path))
            if path is not None:
                self._writer.execute("PRAGMA journal_mode = WAL")
            self._writer.execute("PRAGMA synchronous = FULL")
            migrate(self._writer)
            self._reader = self._writer if path is None else _connect(str(path))

    def load(self) -> Loaded:
        """All of it, weights that no name means left out."""
        with told("read"):
            records = [_RECORDS.decode(row[0]) for row in self._reader.execute("SELECT record FROM names")]
            weights = [_WEIGHTS.decode(row[0]) for row in self._reader.execute("SELECT weights FROM revisions")]
            aliases = [_ALIASES.decode(row[0]) for row in self._reader.execute("SELECT alias FROM aliases")]
        used = {version.revision for record in records for version in record.versions}
        return Loaded(records, [it for it in weights if it.revision in used], aliases)

    def commit(self, change: Change, actor: str, new: Mapping[str, tuple[Weights, Content]]) -> None:
        """Write one change with what is `new` of weights (by revision), and a line of the log. All of it or nothing.

        Raises StoreFull or StoreFailed.
        """
        encode = msgspec.msgpack.encode
        with told("written"), self._transaction() as write:
            for revision, (weights, content) in new.items():
                row = (revision, encode(weights), content.package, content.description)
                write("INSERT OR REPLACE INTO revisions VALUES (?, ?, ?, ?)", row)
                for it in content.files:
                    write("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", (revision, it.file, it.sha256, it.size))
            if change.weights is not None:
                write("UPDATE revisions SET weights = ? WHERE revision = ?",
                      (encode(change.weights), change.weights.revision))  # fmt: skip
            if change.record is not None:
                write("INSERT OR REPLACE INTO names VALUES (?, ?)", (change.name, encode(change.record)))
            elif change.alias is not None:
                write("INSERT OR REPLACE INTO aliases VALUES (?, ?)", (change.name, encode(change.alias)))
            elif change.action == "delete":
                write("DELETE FROM names WHERE name = ?", (change.name,))
            elif change.action == "unalias":
                write("DELETE FROM aliases WHERE name = ?", (change.name,))
            details = change.details and clean(change.details, _MAX_DETAILS)
            line = (time.time(), clean(actor, _MAX_ACTOR), change.action, change.name, change.revision, details)
            write("INSERT INTO log (at, actor, action, name, revision, details) VALUES (?, ?, ?, ?, ?, ?)", line)

    def forget(self, revisions: Sequence[str]) -> list[SourceFile]:
        """Drop weights that no name means. Returns their files."""
        dropped: list[SourceFile] = []
        with told("written"), self._transaction() as write:
            for revision in revisions:
                dropped += self.files(revision)
                write("DELETE FROM revisions WHERE revision = ?", (revision,))
        return dropped

    def unused(self) -> list[str]:
        """Revisions that no name means: what was dropped when the server ended in mid-change."""
        loaded = self.load()
        used = {it.revision for it in loaded.weights}
        with told("read"):
            rows = self._reader.execute("SELECT revision FROM revisions").fetchall()
        return [revision for (revision,) in rows if revision not in used]

    # -- what is kept of a revision -----------------------------------------------------------

    def has(self, revision: str) -> bool:
        return self._one("SELECT 1 FROM revisions WHERE revision = ?", revision) is not None

    def package(self, revision: str) -> bytes | None:
        return self._one("SELECT package FROM revisions WHERE revision = ?", revision)

    def content(self, revision: str) -> Content | None:
        package = self.package(revision)
        description = self._one("SELECT description FROM revisions WHERE revision = ?", revision)
        return Content(package, description, tuple(self.files(revision))) if package and description else None

    def files(self, revision: str) -> list[SourceFile]:
        """With paths relative to the blobs."""
        with told("read"):
            rows = self._reader.execute("SELECT file, sha256, size FROM files WHERE revision = ?", (revision,))
            return [SourceFile(file, blob_path(sha256), size, sha256) for file, sha256, size in rows]

    def is_blob_used(self, sha256: str) -> bool:
        return self._one("SELECT 1 FROM files WHERE sha256 = ? LIMIT 1", sha256) is not None

    def blobs(self) -> dict[str, int]:
        """Sizes of all blobs that any revision has, by hash."""
        with told("read"):
            return dict(self._reader.execute("SELECT DISTINCT sha256, size FROM files").fetchall())

    # -- identity and log -----------------------------------------------------------

    def identity(self, key: str) -> bytes | None:
        return self._one("SELECT value FROM identity WHERE key = ?", key)

    def identify(self, values: Mapping[str, bytes]) -> None:
        with told("written"), self._transaction() as write:
            for key, value in values.items():
                write("INSERT OR REPLACE INTO identity VALUES (?, ?)", (key, value))

    def log(self, after: int = 0, limit: int = 100) -> list[LogLine]:
        """Lines in the order in which they were written, from behind the id `after`."""
        with told("read"):
            rows = self._reader.execute("SELECT * FROM log WHERE id > ? ORDER BY id LIMIT ?", (after, limit))
            return [LogLine(*row) for row in rows]

    def backup(self, path: Path) -> None:
        """A copy as of one moment, while changes may go on."""
        with told("copied"):
            copy = _connect(str(path))
            try:
                self._reader.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")  # one file
            finally:
                copy.close()

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    # -- helpers -----------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., object]]:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield self._writer.execute
            self._writer.execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:  # some errors end it by themselves
                self._writer.execute("ROLLBACK")
            raise

    def _one(self, query: str, key: str) -> bytes | None:
        with told("read"):
            row = self._reader.execute(query, (key,)).fetchone()
        return row[0] if row else None


def blob_path(sha256: str) -> str:
    """Of a blob, relative to the directory of all."""
    return f"{sha256[:2]}/{sha256}"


def _connect(path: str, uri: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False, uri=uri)
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


@contextmanager
def told(what: str) -> Iterator[None]:
    """SQLite's errors and the file system's as ours, without paths. `what` could not be done with the store."""
    try:
        yield
    except AdapterError:
        raise
    except msgspec.MsgspecError as error:
        raise StoreUnfit(
            f"the store's database holds what this Heddle does not understand ({error}); restore it from a backup, or "
            "use the newer Heddle that wrote it"
        ) from None
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise StoreUnfit(f"the store's database is damaged ({error}); restore it from a backup") from None
        full = code == sqlite3.SQLITE_FULL
        remedy = "make room on its disk" if full else "see to its disk"
        message = f"the store could not be {what} ({error}); {remedy} and try again: nothing has changed"
        raise (StoreFull if full else StoreFailed)(message) from None
