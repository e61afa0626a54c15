"""Files that strangers change while they are read: links, what is no file, and descriptors that all come back."""

import errno
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from adapters_store import files
from adapters_store.errors import AdapterError, AdapterPathRefused, InvalidAdapter, UnsupportedAdapter
from adapters_store.files import Folder, open_resolved, read_exactly
from adapters_store.room import Room
from adapters_store.rules import Rules
from tests.support.adapter_files import BASE, DENSE, esft, lora

SECRET = "a line of somebody else's file"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_text(json.dumps({"peft_type": SECRET}))
    return tmp_path / "root"


def read(root: Path, name: str = "a", room: Room | None = None) -> Any:
    return Rules(BASE, (root,), room).read("x", name).package


def test_a_hub_caches_links_are_followed_within_the_root(root: Path) -> None:
    """models--org--Name/snapshots/<hash>/file -> ../../blobs/<hash>; the engine is told of the blob."""
    snapshot, blobs = root / "models--o--n" / "snapshots" / "abc", root / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for file in lora(root / "plain").iterdir():
        file.rename(blobs / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    package = read(root, "models--o--n/snapshots/abc")
    assert [Path(file.path) for file in package.files] == [blobs.resolve() / "hash-of-adapter_model.safetensors"]


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_out_of_the_roots_are_refused(root: Path, file: str) -> None:
    path = lora(root / "a") / file
    path.rename(root.parent / "outside")
    path.symlink_to(root.parent / "outside")
    with pytest.raises(AdapterPathRefused, match="outside the adapter directories"):
        read(root)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("was_link", [False, True])
def test_a_file_exchanged_for_a_link_between_look_and_open_is_not_followed(
    root: Path, monkeypatch: pytest.MonkeyPatch, file: str, was_link: bool
) -> None:
    """The race, won every time: the exchange is made where the name has been judged and not yet opened."""
    path = lora(root / "a") / file
    blob = root / "blob"
    if was_link:
        path.rename(blob)
        path.symlink_to(blob)
    listed, resolved, target = Folder._list, os.path.realpath, str(blob.resolve())

    def exchange(victim: Path) -> None:
        victim.unlink()
        victim.symlink_to(root.parent / "secret")

    def list_then_exchange(folder: Folder) -> Any:
        names = listed(folder)
        exchange(path)
        return names

    def resolve_then_exchange(name: str) -> str:
        found = resolved(name)
        if found == target:
            exchange(blob)
        return found

    if was_link:
        monkeypatch.setattr(os.path, "realpath", resolve_then_exchange)
    else:
        monkeypatch.setattr(Folder, "_list", list_then_exchange)
    with pytest.raises(AdapterError) as refusal:
        read(root)
    assert file in str(refusal.value) and SECRET not in str(refusal.value)


def test_a_directory_exchanged_for_a_link_is_not_followed(root: Path) -> None:
    outside = lora(root.parent / "outside")
    (root / "sub").symlink_to(outside)
    with pytest.raises(NotADirectoryError):
        open_resolved(str(root.resolve() / "sub" / "adapter_config.json"))
    with pytest.raises(OSError) as refusal:
        open_resolved(str(root.resolve() / "sub"))
    assert refusal.value.errno == errno.ELOOP


@pytest.mark.parametrize("instead", ["link", "file"])
def test_an_adapters_directory_exchanged_after_it_was_judged_is_not_followed(
    root: Path, monkeypatch: pytest.MonkeyPatch, instead: str
) -> None:
    """The race again, for the directory itself."""
    directory, outside = lora(root / "a"), lora(root.parent / "outside")
    resolved, judged = os.path.realpath, str(directory.resolve())

    def resolve_then_exchange(name: str) -> str:
        found = resolved(name)
        if found == judged:
            directory.rename(root / "before")
            if instead == "link":
                directory.symlink_to(outside)
            else:
                directory.touch()
        return found

    monkeypatch.setattr(os.path, "realpath", resolve_then_exchange)
    with pytest.raises(InvalidAdapter, match="^'a' is not a directory; send that of the adapter$"):
        read(root)


def test_a_listing_tells_directories_from_the_rest_and_a_link_is_no_directory(root: Path) -> None:
    directory = root / "a"
    for name in ("b", "a"):
        (directory / name).mkdir(parents=True)
    (directory / "z").touch()
    (directory / "link").symlink_to(directory / "a")
    with Folder(str(directory), (str(root.resolve()),)) as folder:
        assert (folder.names, folder.directories) == (["link", "z"], ["a", "b"])
        assert (folder.path, folder.name, folder.root) == (str(directory.resolve()), "a", str(root.resolve()))


def test_the_top_of_all_directories_can_be_opened() -> None:
    descriptor = open_resolved("/", os.O_RDONLY | os.O_DIRECTORY)
    assert os.path.samestat(os.fstat(descriptor), os.stat("/"))
    os.close(descriptor)


def test_what_is_read_is_the_file_that_was_opened(root: Path) -> None:
    """A file put in its place afterwards changes nothing: descriptors are read, not names."""
    lora(root / "a")
    with Folder(str(root / "a"), (str(root.resolve()),)) as folder:
        opened = folder.open("adapter_config.json")
        (root / "b").write_text("[]")
        os.replace(root / "b", root / "a" / "adapter_config.json")
        assert folder.open("adapter_config.json") is opened
        assert json.loads(opened.read(0, opened.size))["peft_type"] == "LORA"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("FIFO", "{file} is not a regular file"),
        ("socket", "{file} cannot be read: No such device or address"),
        ("device", "'{file}' lies outside the adapter directories"),
        ("directory", "holds no adapter|{file} is missing"),
        ("loop", "{file} cannot be read: Too many levels of symbolic links"),
    ],
)
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_no_regular_file_is_refused_without_waiting(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: str, says: str, file: str
) -> None:
    path = lora(root / "a") / file
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            monkeypatch.chdir(path.parent)  # the path may be longer than a socket's address
            listener.bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(path)
    with pytest.raises(AdapterError, match=says.format(file=file)):
        read(root)


def test_a_directory_that_is_a_loop_of_links_is_refused(root: Path) -> None:
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")
    with pytest.raises(InvalidAdapter):
        read(root)


def test_a_directory_of_endless_entries_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ENTRIES", 5)
    directory = lora(root / "a")
    for number in range(3):
        (directory / str(number)).mkdir()
    assert read(root).kind == "lora"
    (directory / "one more").touch()
    with pytest.raises(InvalidAdapter, match="^'a' has more than 5 entries: give the adapter a directory of its own$"):
        read(root)


def test_no_descriptor_is_left_open(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    lora(root / "a")
    esft(root / "b", {1: [0]})
    read(root)
    with pytest.raises(UnsupportedAdapter):
        Rules(DENSE, (root,)).read("x", "b")
    for path in ("nowhere", "../root", "/etc"):
        with pytest.raises(AdapterError):
            read(root, path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_read_is_the_directory_that_was_opened(root: Path) -> None:
    """A directory put in its place afterwards changes nothing either."""
    lora(root / "a")
    lora(root / "other", r=7)
    with Folder(str(root / "a"), (str(root.resolve()),)) as folder:
        (root / "a").rename(root / "before")
        (root / "other").rename(root / "a")
        opened = folder.open("adapter_config.json")
        assert json.loads(opened.read(0, opened.size))["r"] == 2


def test_a_file_that_was_cut_short_since_is_told_so(root: Path) -> None:
    path = lora(root / "a") / "adapter_config.json"
    with Folder(str(root / "a"), (str(root.resolve()),)) as folder:
        opened = folder.open("adapter_config.json")
        os.truncate(path, opened.size - 1)
        assert len(opened.read(0, opened.size - 1)) == opened.size - 1
        with pytest.raises(InvalidAdapter, match=r"^adapter_config\.json was cut short while it was read; try again$"):
            opened.read(0, opened.size)
        with pytest.raises(InvalidAdapter, match=r"^gone is missing: copy it there$"):
            folder.open("gone")


def test_reads_that_bring_less_than_was_asked_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As network file systems do, and signals."""
    (tmp_path / "x").write_bytes(bytes(range(100)))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: whole(descriptor, [buffers[0][:7]], offset))
    descriptor = open_resolved(str((tmp_path / "x").resolve()))
    into = bytearray(60)
    read_exactly(descriptor, 30, memoryview(into))
    assert bytes(into) == bytes(range(30, 90))
    with pytest.raises(EOFError, match="it ends before its data"):
        read_exactly(descriptor, 50, memoryview(into))
    os.close(descriptor)
