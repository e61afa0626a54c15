"""A copy of a store: whole or not there."""

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import pytest

from adapters_store.catalog import Change
from adapters_store.errors import StoreFailed, StoreFull
from adapters_store.parts import SourceFile
from adapters_store.records import Content, Record, Version, Weights
from adapters_store.store import backup
from adapters_store.store.backup import back_up
from adapters_store.store.journal import Journal, blob_path
from adapters_store.store.store import Store, open_store


def add(store: Store, name: str, raw: bytes) -> SourceFile:
    """An adapter whose only file holds these bytes; its revision is their hash."""
    digest = sha256(raw).hexdigest()
    file = SourceFile("w", blob_path(digest), len(raw), digest)
    blob = store.blobs.root / file.path
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(raw)
    weights = Weights(digest, "lora", len(raw))
    record = Record(name, (Version(digest, "root", 5),), 5)
    store.commit(
        Change("register", name, record=record, weights=weights), "me", (weights, Content(b"p", b"{}", (file,)))
    )
    return file


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """It stays open: a server has it."""
    with closing(open_store(tmp_path / "store")) as store:
        add(store, "a", b"first")
        add(store, "b", b"second")
        store.identify({"fingerprint": b"it"})
        yield store


def no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EXDEV, "another file system")


@pytest.mark.parametrize("is_linked", [True, False])
def test_a_backup_is_a_store(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_linked: bool) -> None:
    if not is_linked:
        monkeypatch.setattr(os, "link", no_links)
    stray = store.blobs.root / "ab" / ("ab" * 32)
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"nobody's")
    done = back_up(store.directory, tmp_path / "copies" / "copy")
    assert done == (2, 2, 11, 2 if is_linked else 0)
    add(store, "c", b"after it")
    with closing(open_store(tmp_path / "copies" / "copy")) as copy:
        assert {it.name for it in copy.load().records} == {"a", "b"}
        assert copy.journal.identity("fingerprint") == b"it" and len(copy.log()) == 2
        blobs = list(copy.blobs.present())
        assert len(blobs) == 2 and not any(copy.blobs.fault(it, read=True) for it in blobs)


def test_an_empty_directory_will_do_and_another_will_not(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    back_up(store.directory, tmp_path / "empty")
    for target, told in ((tmp_path / "empty", "not empty"), (store.directory / "below", "in the store itself")):
        with pytest.raises(StoreFailed, match=told):
            back_up(store.directory, target)
    assert not (store.directory / "below").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreFailed, match="cannot be written"):
        back_up(store.directory, tmp_path / "file")
    with pytest.raises(StoreFailed, match="holds no store"):
        back_up(tmp_path / "none", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_lost_blob_is_named_and_leaves_no_half_of_a_backup(store: Store, tmp_path: Path) -> None:
    (store.blobs.root / add(store, "lost", b"third").path).unlink()
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "new", tmp_path / "empty"):
        with pytest.raises(StoreFailed, match="has lost the blob .* of lost"):
            back_up(store.directory, target)
    assert not (tmp_path / "new").exists() and list((tmp_path / "empty").iterdir()) == []


def test_what_is_collected_meanwhile_is_not_lost(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server forgets weights after the catalogue was copied and before their blob was."""
    real, times = Journal.backup, []

    def then_collect(journal: Journal, path: Path) -> None:
        real(journal, path)
        times.append(path)
        if len(times) == 1:
            store.commit(Change("delete", "b"), "me")
            store.forget([sha256(b"second").hexdigest()])

    monkeypatch.setattr(Journal, "backup", then_collect)
    assert back_up(store.directory, tmp_path / "copy").num_names == 1 and len(times) == 2
    with closing(open_store(tmp_path / "copy")) as copy:
        assert [it.size for it in copy.blobs.present()] == [5]


@pytest.mark.parametrize("raw", [b"FIRST", b"longer"])
def test_a_damaged_blob_is_not_copied_as_if_it_were_sound(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes
) -> None:
    monkeypatch.setattr(os, "link", no_links)
    (store.blobs.root / blob_path(sha256(b"first").hexdigest())).write_bytes(raw)
    with pytest.raises(StoreFailed, match="in the store"):
        back_up(store.directory, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_full_disk_leaves_nothing_behind(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directory: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(backup, "sync_directory", full)
    with pytest.raises(StoreFull):
        back_up(store.directory, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
