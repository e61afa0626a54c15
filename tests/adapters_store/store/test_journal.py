"""The catalogue on disk: a change is there whole when it is acknowledged, and not at all when it is not."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from adapters_store.catalog import Change
from adapters_store.errors import StoreFailed, StoreFull, StoreLocked, StoreUnfit
from adapters_store.manifest import Manifest
from adapters_store.parts import SourceFile
from adapters_store.records import Alias, Content, Record, Target, Version, Weights
from adapters_store.store import schema
from adapters_store.store.journal import blob_path
from adapters_store.store.store import DATABASE, RESERVE_BYTES, Store, open_store

CONTENT = Content(b"\x80", b"{}", (SourceFile("w", blob_path("ab" * 32), 7, "ab" * 32),))


def added(name: str, revision: str = "1" * 64, is_durable: bool = True) -> tuple[Change, tuple[Weights, Content]]:
    weights = Weights(revision, "lora", 7)
    record = Record(name, (Version(revision, "root", 5, Manifest(description="it")),), 5, is_durable)
    return Change("register", name, record=record, weights=weights), (weights, CONTENT)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(directory: Path) -> Iterator[Store]:
    with closing(open_store(directory)) as store:
        yield store


def test_what_was_written_is_there_after_a_restart(directory: Path) -> None:
    change, new = added("name")
    alias = Alias("alias", (Target("name", 0.5),), 6)
    with closing(open_store(directory)) as store:
        store.commit(change, "me", new)
        store.commit(Change("alias", "alias", alias=alias), "you")
    with closing(open_store(directory)) as store:
        loaded = store.load()
        assert loaded.records == [change.record] and loaded.weights == [new[0]] and loaded.aliases == [alias]
        assert store.package("1" * 64) == b"\x80" and store.content("1" * 64) == CONTENT
        told = [(it.id, it.actor, it.action, it.name, it.revision) for it in store.log()]
        assert told == [(1, "me", "register", "name", "1" * 64), (2, "you", "alias", "alias", None)]
        assert store.log(after=1, limit=5)[0].name == "alias" and store.log(after=2) == []


def test_what_is_not_to_outlive_the_server_does_not_until_it_is(store: Store) -> None:
    change, new = added("name", is_durable=False)
    store.commit(change, "me", new)
    assert store.content("1" * 64) == CONTENT and store.journal.load().records == []
    durable, _ = added("name")
    store.commit(durable, "me")  # its weights are known, to this server only
    assert store.journal.load().records == [durable.record] and store.journal.content("1" * 64) == CONTENT


def test_a_blob_goes_when_the_last_weights_do_that_have_it(store: Store) -> None:
    shared = store.blobs.root / CONTENT.files[0].path
    shared.parent.mkdir()
    shared.write_bytes(b"1234567")
    for name, revision in (("a", "1" * 64), ("b", "2" * 64)):
        change, new = added(name, revision)
        store.commit(change, "me", new)
    assert store.forget(["1" * 64]) == 0 and shared.exists()
    assert store.forget(["2" * 64]) == 7 and not shared.exists()
    assert store.forget([]) == 0 == store.forget(["3" * 64])


def test_weights_that_no_name_means_are_dropped_at_the_next_start(store: Store) -> None:
    change, new = added("name")
    store.commit(change, "me", new)
    store.journal.commit(Change("delete", "name"), "me", {})  # and then the server was killed
    assert store.journal.has("1" * 64)
    assert store.load().records == [] and not store.journal.has("1" * 64)


def test_the_log_cannot_be_rewritten(store: Store) -> None:
    store.commit(*added("name")[:1], "me", added("name")[1])
    for statement in ("DELETE FROM log", "UPDATE log SET actor = 'you'"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            store.journal._writer.execute(statement)


def test_what_strangers_say_is_cleaned_before_it_is_logged(store: Store) -> None:
    change, new = added("name")
    store.commit(Change(**{name: getattr(change, name) for name in change.__struct_fields__} | {
        "details": "\x1b[31m" + "x" * 5000}), "\x07me", new)  # fmt: skip
    line = store.log()[0]
    assert line.actor == "\\x07me" and line.details is not None and "\x1b" not in line.details
    assert len(line.details) <= 1000


# -- one writer ---


def test_a_store_has_one_server_at_a_time(store: Store) -> None:
    with pytest.raises(StoreLocked, match="in use by another server or command"):
        open_store(store.directory)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    script = f"from pathlib import Path; from adapters_store.store.store import open_store; open_store(Path({str(tmp_path / 's')!r})); import os; os.kill(os.getpid(), 9)"  # noqa: E501
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    open_store(tmp_path / "s").close()


# -- when the disk fails ---


class Failing:
    """A connection on which one statement fails, as a full disk makes it."""

    def __init__(self, real: sqlite3.Connection, at: str) -> None:
        self._real, self._at = real, at

    def execute(self, query: str, *values: object) -> object:
        if query.startswith(self._at):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return self._real.execute(query, *values)

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)


@pytest.mark.parametrize("at", ["INSERT OR REPLACE INTO revisions", "INSERT OR REPLACE INTO names", "INSERT INTO log",
                                "COMMIT"])  # fmt: skip
def test_a_change_that_cannot_be_written_leaves_what_was(store: Store, at: str) -> None:
    first, new = added("first")
    store.commit(first, "me", new)
    real = store.journal._writer
    store.journal._writer = Failing(real, at)  # type: ignore[assignment]
    with pytest.raises(StoreFull, match="nothing has changed"):
        store.commit(*added("second", "2" * 64)[:1], "me", added("second", "2" * 64)[1])
    store.journal._writer = real
    assert store.load().records == [first.record] and len(store.log()) == 1
    second, new = added("second", "2" * 64)
    store.commit(second, "me", new)
    assert len(store.load().records) == 2


def test_a_full_disk_still_lets_go(store: Store) -> None:
    """What was kept in reserve is given up for a deletion, and for nothing else."""
    change, new = added("first")
    store.commit(change, "me", new)
    real, reserve = store.journal, store.directory / "reserve"
    assert reserve.stat().st_size == RESERVE_BYTES

    class Full:
        def commit(self, *args: Any) -> None:
            if reserve.exists():
                raise StoreFull("no room")
            real.commit(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    store.journal = Full()  # type: ignore[assignment]
    with pytest.raises(StoreFull):
        store.commit(added("second", "2" * 64)[0], "me", added("second", "2" * 64)[1])
    assert reserve.exists()
    store.commit(Change("delete", "first"), "me")
    assert not reserve.exists() and real.load().records == []
    store.journal = real
    store.forget(["1" * 64])
    assert reserve.exists()  # there is room again


def test_a_directory_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreFailed, match="cannot be written"):
        open_store(tmp_path / "file" / "store")


def test_a_damaged_database_is_no_store(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    (tmp_path / DATABASE).write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreUnfit, match="damaged"):
        open_store(tmp_path)
    (tmp_path / "lock").unlink()  # nobody holds it
    assert (tmp_path / DATABASE).read_bytes().startswith(b"not a database")


@pytest.mark.parametrize("table", ["names SET record", "revisions SET weights", "aliases SET alias"])
def test_what_is_not_understood_is_told_and_not_overwritten(store: Store, directory: Path, table: str) -> None:
    change, new = added("x")
    store.commit(change, "me", new)
    store.commit(Change("alias", "y", alias=Alias("y", (Target("x"),), 5)), "me")
    with closing(sqlite3.connect(directory / DATABASE)) as other:
        other.execute(f"UPDATE {table} = x'93'")
        other.commit()
    with pytest.raises(StoreUnfit, match="restore it from a backup"):
        store.load()
    assert store.journal.has("1" * 64)


# -- versions ---


def test_an_older_store_takes_the_steps_that_it_lacks_and_keeps_what_it_has(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, new = added("name")
    store.commit(change, "me", new)
    step = "ALTER TABLE names ADD COLUMN more INTEGER NOT NULL DEFAULT 3;"
    schema.migrate(store.journal._writer, (*schema.MIGRATIONS, step))
    assert store.journal._writer.execute("SELECT name, more FROM names").fetchall() == [("name", 3)]
    with pytest.raises(StoreUnfit, match="has version 2, and this Heddle knows versions up to 1"):
        schema.migrate(store.journal._writer)


def test_a_step_that_fails_has_not_happened(store: Store) -> None:
    steps = (*schema.MIGRATIONS, "CREATE TABLE extra (x); CREATE TABLE extra (x);")
    with pytest.raises(sqlite3.OperationalError):
        schema.migrate(store.journal._writer, steps)
    connection = store.journal._writer
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'extra'").fetchone() == (0,)


# -- backup ---


def test_a_backup_is_a_store_as_of_one_moment(store: Store, tmp_path: Path) -> None:
    change, new = added("name")
    store.commit(change, "me", new)
    (tmp_path / "copy").mkdir()
    store.journal.backup(tmp_path / "copy" / DATABASE)
    store.commit(Change("delete", "name"), "me")
    copy = open_store(tmp_path / "copy")
    assert copy.load().records == [change.record] and [it.action for it in copy.log()] == ["register"]
    copy.close()
