"""Our reader of safetensors against the library's, and what it refuses beyond that: holes, counts, useless weights."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adapters_store import safetensors_file
from adapters_store.errors import InvalidAdapter
from adapters_store.files import OpenFile, open_resolved
from adapters_store.safetensors_file import MAX_HEADER_BYTES, hash_and_check, read_header
from tests.support.adapter_files import A0, BASE, edit_weights, lora, read_adapter


def _raw(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _file(path: Path, header: bytes, data: bytes) -> Path:
    path.write_bytes(_raw(header, data))
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


_F32 = b'{"dtype":"F32","shape":[2],"data_offsets":'


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0\0",
        (2**63).to_bytes(8, "little"),
        _raw(b"{}"),
        _raw(b"[]"),
        _raw(b"\xff\xfe"),
        _raw(b'{"a":' + _F32 + b"[0,8]}}", b"\0" * 4),  # truncated
        _raw(b'{"a":' + _F32 + b"[0,8]}}", b"\0" * 12),  # trailing bytes
        _raw(b'{"a":' + _F32 + b'[0,8]},"b":' + _F32 + b"[4,12]}}", b"\0" * 12),  # overlap
        _raw(b'{"a":' + _F32 + b'[0,8]},"a":' + _F32 + b"[8,16]}}", b"\0" * 16),  # the same key twice
        _raw(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),  # empty tensor
        _raw(b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', b"\0" * 8),
        _raw(b"[" * 50_000),
    ],
)
def test_broken_safetensors(tmp_path: Path, raw: bytes) -> None:
    directory = lora(tmp_path / "a")
    (directory / "adapter_model.safetensors").write_bytes(raw)
    with pytest.raises(InvalidAdapter):
        read_adapter(directory, BASE)


def test_a_great_many_tensors_are_refused_by_count(tmp_path: Path) -> None:
    """In several files, since the header of one has no room for so many."""
    directory = tmp_path / "a"
    directory.mkdir()
    for shard in range(3):
        header = {
            f"{shard}.{i}": {"dtype": "F16", "shape": [1], "data_offsets": [2 * i, 2 * i + 2]} for i in range(7000)
        }
        raw = _raw(json.dumps(header, separators=(",", ":")).encode(), b"\0" * 14_000)
        (directory / f"model-{shard}.safetensors").write_bytes(raw)
    (directory / "expert_cfg.json").write_text('{"experts": {"1": [0]}}')
    with pytest.raises(InvalidAdapter, match="holds 21,000 tensors; 1 to 20,000"):
        read_adapter(directory, BASE)


def test_a_header_over_a_mebibyte_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lora(tmp_path / "a") / "adapter_model.safetensors"
    with path.open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(64 << 20)
    monkeypatch.setattr(safetensors_file, "parse_json", None)
    with pytest.raises(InvalidAdapter, match="header of 1,048,577 bytes; at most 1,048,576"):
        read_adapter(path.parent, BASE)


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_and_infinite_weights_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        for key in tensors:
            tensors[key] = tensors[key].to(dtype)
        tensors[A0][1, 3] = value

    with pytest.raises(InvalidAdapter, match="q_proj.lora_A.weight holds NaN or infinite"):
        read_adapter(edit_weights(lora(tmp_path / "a"), poison), BASE)


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[A0] = tensors[A0].double()

    with pytest.raises(InvalidAdapter, match="F64"):
        read_adapter(edit_weights(lora(tmp_path / "a"), widen), BASE)


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
