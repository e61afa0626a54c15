"""Files that strangers change while they are read: links, sizes, headers, and what is in them."""

import json
import math
import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adapters_store import files, safetensors_file
from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterError, AdapterPathRefused, InvalidAdapter, UnsupportedAdapter
from adapters_store.files import Folder, OpenFile, open_resolved
from adapters_store.room import Room
from adapters_store.safetensors_file import MAX_HEADER_BYTES, hash_and_check, read_header
from tests.adapters_store.test_formats import A0, BASE, DENSE, esft, lora

SECRET = "a line of somebody else's file"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_text(json.dumps({"peft_type": SECRET}))
    return tmp_path / "root"


def read(root: Path, name: str = "a", room: Room | None = None) -> Any:
    return Catalog("base", BASE, (root,), room).read("x", name).package


# -- links ---


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
    with pytest.raises(OSError):
        open_resolved(str(root.resolve() / "sub" / "adapter_config.json"))
    with pytest.raises(OSError):
        open_resolved(str(root.resolve() / "sub"))


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
@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "directory", "loop"])
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_no_regular_file_is_refused_without_waiting(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: str, file: str
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
    with pytest.raises(AdapterError):
        read(root)


def test_a_directory_that_is_a_loop_of_links_is_refused(root: Path) -> None:
    (root / "a").symlink_to(root / "b")
    (root / "b").symlink_to(root / "a")
    with pytest.raises(InvalidAdapter):
        read(root)


# -- headers: ours against the library's ---


def _file(path: Path, header: bytes, data: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def _open(path: Path) -> OpenFile:
    return OpenFile(open_resolved(str(path.resolve())), path.name, str(path))


def _tensors(path: Path) -> dict[str, tuple[int, ...]] | None:
    file = _open(path)
    try:
        return {tensor.key: tensor.shape for tensor in read_header(file).tensors}
    except InvalidAdapter:
        return None
    finally:
        os.close(file.descriptor)


_SIZE = st.integers(0, 6)
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "F64", "nonsense"]),
        "shape": st.lists(_SIZE, max_size=3) | st.just([-1]) | st.just([2.0]) | st.just([True]) | st.just([2**63]),
        "data_offsets": st.tuples(_SIZE.map(lambda it: 4 * it), _SIZE.map(lambda it: 4 * it)).map(list) | st.just([0]),
    }
)


_METADATA = st.dictionaries(st.just("k"), st.just("v") | st.just(1), max_size=1)


@settings(max_examples=400, deadline=None)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), _ENTRY | _METADATA, min_size=1),
    size=st.integers(0, 24),
)
def test_what_we_accept_the_library_accepts(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size: int
) -> None:
    path = _file(tmp_path_factory.getbasetemp() / "fuzz", json.dumps(header).encode(), b"\0" * size)
    ours = _tensors(path)
    if ours is not None:
        with safe_open(path, framework="pt") as library:
            assert {key: tuple(library.get_slice(key).get_shape()) for key in library.keys()} == ours


@settings(max_examples=100, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda key: key != "__metadata__"),
        st.tuples(
            st.lists(st.integers(1, 5), min_size=1, max_size=3),
            st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_we_accept_what_the_library_writes(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "written"
    save_file({key: torch.ones(shape, dtype=dtype) for key, (shape, dtype) in tensors.items()}, path)
    assert _tensors(path) == {key: tuple(shape) for key, (shape, _) in tensors.items()}


def test_the_library_refuses_what_we_refuse_of_offsets(tmp_path: Path) -> None:
    for offsets, size in (([0, 8], 4), ([0, 8], 12), ([4, 12], 12), ([8, 0], 8)):
        header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}).encode()
        path = _file(tmp_path / "x", header, b"\0" * size)
        assert _tensors(path) is None
        with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
            pass


def test_a_header_over_a_mebibyte_is_refused_before_it_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lora(root / "a") / "adapter_model.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(64 << 20)
    monkeypatch.setattr(safetensors_file, "parse_json", None)
    with pytest.raises(InvalidAdapter, match="header of 1,048,577 bytes; at most 1,048,576"):
        read(root)


def test_headers_of_large_adapters_have_room(tmp_path: Path) -> None:
    """7 linears of 60 layers, and 600 tuned experts of a large mixture."""
    names = [f"base_model.model.model.layers.{layer}.self_attn.{name}_proj.lora_{side}.weight" for layer in range(60)
             for name in ("q", "k", "v", "o", "gate", "up", "down") for side in "AB"]  # fmt: skip
    experts = [f"model.layers.{i % 60}.mlp.experts.{i}.{name}_proj.weight" for i in range(600)
               for name in ("gate", "up", "down")]  # fmt: skip
    for keys in (names, experts):
        header = {key: {"dtype": "BF16", "shape": [16384, 53248], "data_offsets": [10**12 + i, 10**12 + i + 1]}
                  for i, key in enumerate(keys)}  # fmt: skip
        assert len(json.dumps(header)) < MAX_HEADER_BYTES / 3


# -- what is in them ---


def _bits(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([0.5, value, -0.25], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "largest", "too_large"),
    [
        (torch.float32, 65504.0, math.nextafter(65504.0, 1e9) + 0.004),
        (torch.float16, 65504.0, math.inf),
        (torch.bfloat16, 65280.0, 65536.0),
        (torch.float32, -65504.0, -1e38),
        (torch.bfloat16, -65280.0, -1e38),
    ],
)
def test_weights_of_absurd_size_are_refused(
    tmp_path: Path, dtype: torch.dtype, largest: float, too_large: float
) -> None:
    for value, sound in ((largest, True), (too_large, False)):
        save_file({"w": _bits(value, dtype)}, tmp_path / "x")
        file = _open(tmp_path / "x")
        if sound:
            assert hash_and_check(read_header(file)).size == file.size
        else:
            with pytest.raises(InvalidAdapter, match="w holds (NaN or infinite weights|a weight above 65,504)"):
                hash_and_check(read_header(file))
        os.close(file.descriptor)


def test_every_chunk_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_CHUNK_BYTES", 64)
    for place in (0, 15, 16, 39):
        weights = torch.ones(40)
        weights[place] = 1e38
        save_file({"w": weights}, tmp_path / "x")
        file = _open(tmp_path / "x")
        with pytest.raises(InvalidAdapter, match="above 65,504"):
            hash_and_check(read_header(file))
        os.close(file.descriptor)


def _sparse(path: Path, shape: tuple[int, int]) -> None:
    key, size = A0, 4 * shape[0] * shape[1]
    other, second = A0.replace("lora_A", "lora_B"), 4 * 8 * shape[0]
    header = json.dumps({
        key: {"dtype": "F32", "shape": shape, "data_offsets": [0, size]},
        other: {"dtype": "F32", "shape": [8, shape[0]], "data_offsets": [size, size + second]},
    }).encode()  # fmt: skip
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size + second)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("adapters_store.formats.hash_and_check", never)


@pytest.mark.usefixtures("unread")
def test_what_the_device_cannot_hold_is_refused_before_its_bytes_are_read(root: Path) -> None:
    directory = lora(root / "a")
    rank = 50_000_000
    _sparse(directory / "adapter_model.safetensors", (rank, 8))  # 3.2 GB that occupy a page
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 1}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedAdapter, match="needs 3,200,000,000 bytes; all adapters together may use 1,000,000"):
        read(root, room=Room(1_000_000, 4, 8))


@pytest.mark.usefixtures("unread")
def test_more_experts_than_a_layer_has_room_for_are_refused_before_their_bytes_are_read(root: Path) -> None:
    esft(root / "a", {1: [0, 1, 2], 2: [3]})
    with pytest.raises(UnsupportedAdapter, match="tunes 3 experts of layer 1; this server has room for 2"):
        read(root, room=Room(1 << 30, 4, 2))


def test_a_directory_of_endless_entries_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_ENTRIES", 5)
    directory = lora(root / "a")
    for number in range(4):
        (directory / str(number)).touch()
    with pytest.raises(InvalidAdapter, match="more than 5 entries"):
        read(root)


def test_no_descriptor_is_left_open(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    lora(root / "a")
    esft(root / "b", {1: [0]})
    read(root)
    with pytest.raises(UnsupportedAdapter):
        Catalog("base", DENSE, (root,)).read("x", "b")
    for path in ("nowhere", "../root", "/etc"):
        with pytest.raises(AdapterError):
            read(root, path)
    assert len(os.listdir("/proc/self/fd")) == before
