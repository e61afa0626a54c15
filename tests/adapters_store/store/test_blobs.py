"""Files by hash: what is stored is what was verified, whole or not at all."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from adapters_store.errors import InvalidAdapter, StoreFailed, StoreFull
from adapters_store.files import OpenFile, StoredFolder
from adapters_store.parts import SourceFile
from adapters_store.store import blobs as module
from adapters_store.store.blobs import Blobs


def sha(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def opened(path: Path) -> OpenFile:
    return OpenFile(os.open(path, os.O_RDONLY), path.name, str(path))


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    blobs = Blobs(tmp_path / "store")
    (tmp_path / "store").mkdir()
    blobs.prepare()
    return blobs


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(os.urandom(9_000_000))
    return path


def stored(blobs: Blobs, file: Path) -> SourceFile:
    with blobs.desk() as desk:
        return desk.keep(opened(file), sha(file.read_bytes()))


def test_what_is_kept_is_a_copy_that_its_source_cannot_change(blobs: Blobs, file: Path) -> None:
    raw = file.read_bytes()
    kept = stored(blobs, file)
    blob = blobs.root / kept.path
    assert (kept.file, kept.size, kept.sha256) == ("weights.safetensors", len(raw), sha(raw))
    file.write_bytes(b"other")
    assert blob.read_bytes() == raw and blob.stat().st_mode & 0o777 == 0o400
    assert blobs.fault(kept, read=True) is None


def test_a_file_that_changes_between_its_hash_and_its_copy_is_refused(blobs: Blobs, file: Path) -> None:
    before = sha(file.read_bytes())
    with file.open("r+b") as changed:
        changed.write(b"x")
    with blobs.desk() as desk, pytest.raises(InvalidAdapter, match="changed while it was read"):
        desk.keep(opened(file), before)
    assert list(blobs.present()) == []


def test_the_same_bytes_are_stored_once(blobs: Blobs, file: Path, tmp_path: Path) -> None:
    first = stored(blobs, file)
    inode = (blobs.root / first.path).stat().st_ino
    again = tmp_path / "again.safetensors"
    again.write_bytes(file.read_bytes())
    second = stored(blobs, again)
    assert second.path == first.path and (blobs.root / first.path).stat().st_ino == inode
    assert [it.sha256 for it in blobs.present()] == [first.sha256]


@pytest.mark.parametrize("damage", [b"", b"short", "flip"])
def test_a_damaged_blob_is_told_of_and_mended_by_the_next_copy(blobs: Blobs, file: Path, damage: bytes | str) -> None:
    kept = stored(blobs, file)
    blob = blobs.root / kept.path
    raw = blob.read_bytes()
    blob.chmod(0o600)
    blob.write_bytes(damage if isinstance(damage, bytes) else bytes([raw[0] ^ 1]) + raw[1:])
    assert blobs.fault(kept, read=True) is not None
    assert (blobs.fault(kept) is None) == (damage == "flip")  # the size alone does not show it
    stored(blobs, file)
    assert blobs.fault(kept, read=True) is None and blob.read_bytes() == raw


def test_a_blob_that_is_missing_is_a_fault(blobs: Blobs, file: Path) -> None:
    kept = stored(blobs, file)
    assert blobs.remove([kept]) == kept.size and blobs.remove([kept]) == 0
    assert "cannot be read from the store" in (blobs.fault(kept) or "")


def test_what_was_being_copied_is_swept_at_the_next_start(blobs: Blobs, file: Path) -> None:
    desk = blobs.desk()
    paths = desk.__enter__().paths
    (Path(paths[1]) / "half").write_bytes(b"half")
    blobs.prepare()
    assert not Path(paths[1]).exists() and blobs.root.is_dir()


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, StoreFull), (errno.EDQUOT, StoreFull), (errno.EROFS, StoreFailed)]
)
@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_disk_that_fails_leaves_nothing_behind(
    blobs: Blobs, file: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], step: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number), "/a/path")

    with monkeypatch.context() as patched, blobs.desk() as desk, pytest.raises(kind) as error:
        patched.setattr(module.os, step, fail)
        desk.keep(opened(file), sha(file.read_bytes()))
    assert "/a/path" not in str(error.value)
    assert list(blobs.present()) == [] and os.listdir(blobs.root.parent / "incoming") == []


def test_a_small_file_is_kept_as_it_was_parsed(blobs: Blobs, tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    config.write_text("another one by now")
    with blobs.desk() as desk:
        kept = desk.keep(opened(config), sha(b"{}"), b"{}")
    with StoredFolder("a", str(blobs.root.resolve()), [kept]) as folder:
        assert folder.names == ["adapter_config.json"] and folder.open("adapter_config.json").read(0, 2) == b"{}"
        with pytest.raises(InvalidAdapter, match="is missing in the store"):
            folder.open("other")


def test_where_blocks_can_be_shared_the_clone_is_what_is_hashed(
    blobs: Blobs, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system here cannot; so the call copies, and what it copied is changed in one of the cases."""
    raw = file.read_bytes()

    def clone(to: int, request: int, source: int) -> int:
        assert request == module._FICLONE
        os.write(to, raw)
        return 0

    monkeypatch.setattr(module.fcntl, "ioctl", clone)
    assert stored(blobs, file).sha256 == sha(raw)
    other = file.with_name("other")
    other.write_bytes(raw[:-1] + b"x")
    with pytest.raises(InvalidAdapter, match="changed while it was read"):
        stored(blobs, other)


def test_what_else_lies_among_the_blobs_is_passed_over(blobs: Blobs, file: Path) -> None:
    kept = stored(blobs, file)
    (blobs.root / "stray").touch()
    (blobs.root / "ab").mkdir(exist_ok=True)
    (blobs.root / "ab" / "notes.txt").touch()
    assert [it.sha256 for it in blobs.present()] == [kept.sha256]
