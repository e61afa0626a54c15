"""Our reader of safetensors against the library's, and what it refuses beyond that: holes, counts, useless weights."""

import hashlib
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adapters_store import safetensors_file, safetensors_header
from adapters_store.errors import InvalidAdapter
from adapters_store.files import OpenFile, open_resolved
from adapters_store.limits import MIN_HEADER_BYTES, Limits
from adapters_store.safetensors_file import Weights, hash_and_check
from tests.support.adapter_files import A0, BASE, edit_weights, lora, read_adapter

LIMITS = Limits()


def read_header(file: OpenFile, limits: Limits = LIMITS) -> Weights:
    return safetensors_file.read_header(file, limits)


def _raw(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _file(path: Path, header: bytes, data: bytes) -> Path:
    path.write_bytes(_raw(header, data))
    return path


def _open(path: Path) -> OpenFile:
    return OpenFile(open_resolved(str(path.resolve())), path.name, str(path))


def _tensors(path: Path, limits: Limits = LIMITS) -> dict[str, tuple[int, ...]] | None:
    file = _open(path)
    try:
        return {tensor.key: tensor.shape for tensor in read_header(file, limits).tensors}
    except InvalidAdapter:
        return None
    finally:
        os.close(file.descriptor)


@st.composite
def _files(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header and the size of its data: sound, or sound but for one thing."""
    header: dict[str, Any] = {}
    end = 0
    for key in draw(st.permutations(["a", "b", "c"]))[: draw(st.integers(1, 3))]:
        dtype, width = draw(st.sampled_from([("F32", 4), ("F16", 2), ("BF16", 2)]))
        shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        begin, end = end, end + width * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    if draw(st.booleans()):
        header["__metadata__"] = {"k": "v"}
    size, tensor = end, header[draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))]
    match draw(st.sampled_from(["sound"] * 4 + ["dtype", "shape", "offsets", "keys", "metadata", "size"])):
        case "dtype":
            tensor["dtype"] = draw(st.sampled_from(["F32", "F16", "I8", "F64", "nonsense", 4]))
        case "shape":
            tensor["shape"] = draw(st.lists(st.integers(-1, 4), max_size=3) | st.sampled_from([[2.0], [True], [2**63]]))
        case "offsets":
            tensor["data_offsets"] = draw(st.lists(st.integers(-4, 24), min_size=1, max_size=3))
        case "keys":
            tensor.pop(draw(st.sampled_from(sorted(tensor))))
        case "metadata":
            header["__metadata__"] = draw(st.sampled_from([{"k": 1}, [], None, {}]))
        case "size":
            size = max(0, size + draw(st.integers(-4, 4)))
    return header, size


def test_what_we_accept_the_library_accepts(tmp_path: Path) -> None:
    accepted: Counter[bool] = Counter()

    @settings(max_examples=400, deadline=None)
    @given(_files())
    def agree(header_and_size: tuple[dict[str, Any], int]) -> None:
        header, size = header_and_size
        path = _file(tmp_path / "fuzz", json.dumps(header).encode(), b"\0" * size)
        ours = _tensors(path)
        accepted[ours is not None] += 1
        if ours is not None:
            with safe_open(path, framework="pt") as library:
                assert {key: tuple(library.get_slice(key).get_shape()) for key in library.keys()} == ours

    agree()
    assert min(accepted[True], accepted[False]) > 50, accepted  # else it would have proved little


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


NOT_SOUND = "x is not a sound safetensors file: "
NO_FIT = "x is not a safetensors file: its header does not fit in it"


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", NO_FIT),
        (b"\0" * 7, NO_FIT),
        (b"\0" * 8, "the header of x is not valid JSON"),
        ((2**63).to_bytes(8, "little"), NO_FIT),
        (b"\3" + b"\0" * 7 + b"{}", NO_FIT),
        (_raw(b"{}"), "x holds 0 tensors; 1 to 20,000 are served"),
        (_raw(b"[]"), "the header of x must be a JSON object, not list"),
        (_raw(b"\xff\xfe"), "the header of x is not UTF-8"),
        (_raw(b"[" * 50_000), "the header of x is not valid JSON"),
        (_raw(b'{"a":' + _F32 + b"[0,8]}}", b"\0" * 4), NOT_SOUND + "its tensors end at 70 of 66 bytes"),
        (_raw(b'{"a":' + _F32 + b"[0,8]}}", b"\0" * 12), NOT_SOUND + "its tensors end at 70 of 74 bytes"),
        (_raw(b'{"a":' + _F32 + b'[0,8]},"b":' + _F32 + b"[4,12]}}", b"\0" * 12),
         NOT_SOUND + "b begins at byte 120, where 124 is due"),
        (_raw(b'{"a":' + _F32 + b'[0,8]},"b":' + _F32 + b"[12,20]}}", b"\0" * 20),
         NOT_SOUND + "b begins at byte 129, where 125 is due"),
        (_raw(b'{"a":' + _F32 + b'[0,8]},"a":' + _F32 + b"[8,16]}}", b"\0" * 16),
         "the header of x has the key 'a' twice in one object"),
        (_raw(b'{"__metadata__":{"k":1}}'), "x has a __metadata__ that is no object of texts"),
        (_raw(b'{"__metadata__":["k"]}'), "x has a __metadata__ that is no object of texts"),
        (_raw(b'{"__metadata__":{"k":"v"}}'), "x holds 0 tensors; 1 to 20,000 are served"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_no_sound_file_is_refused_with_the_numbers(tmp_path: Path, raw: bytes, says: str) -> None:
    message = refusal_of(tmp_path, raw)
    assert message.startswith(says) and message != says  # what to do follows


def refusal_of(directory: Path, raw: bytes, limits: Limits = LIMITS) -> str:
    (directory / "x").write_bytes(raw)
    file = _open(directory / "x")
    with pytest.raises(InvalidAdapter) as refusal:
        read_header(file, limits)
    os.close(file.descriptor)
    return str(refusal.value)


WHOLE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ([], "is not described by dtype, shape and data_offsets"),
        (5, "is not described by dtype, shape and data_offsets"),
        ({"more": 1}, "is not described by dtype, shape and data_offsets"),
        ({"dtype": "F64"}, "has dtype F64; served are F32, F16, BF16"),
        ({"dtype": "BOOL"}, "has dtype BOOL; served are F32, F16, BF16"),
        ({"dtype": "s3cret"}, "has an unknown dtype; served are F32, F16, BF16"),
        ({"dtype": ["F32"]}, "has an unknown dtype; served are F32, F16, BF16"),
        *(({"shape": shape}, "has a shape or offsets that are no sizes")
          for shape in ([-2], [2.0], [True], ["2"], "2", None, {"0": 2}, [1 << 48], [1] * 9)),
        *(({"data_offsets": offsets}, "has a shape or offsets that are no sizes")
          for offsets in ([0], [0, 8, 8], [-8, 0], [0.0, 8], "08", None, {"0": 0, "8": 8}, [0, 1 << 48], [])),
        ({"shape": []}, "has the empty shape []"),
        ({"shape": [3, 0]}, "has the empty shape [3, 0]"),
        ({"data_offsets": [0, 4]}, "has 4 bytes; its shape needs 8"),
        ({"data_offsets": [4, 16]}, "has 12 bytes; its shape needs 8"),
        ({"data_offsets": [8, 4]}, "has -4 bytes; its shape needs 8"),
    ],
)  # fmt: skip
def test_what_describes_no_tensor_is_refused_by_its_name(tmp_path: Path, entry: Any, says: str) -> None:
    header = {"a.key": WHOLE | entry if isinstance(entry, dict) else entry}
    message = refusal_of(tmp_path, _raw(json.dumps(header).encode(), b"\0" * 8))
    assert message.startswith(f"a.key in x {says}") and message != f"a.key in x {says}"  # what to do follows


def test_the_most_of_everything_is_read(tmp_path: Path) -> None:
    """One more of each is refused: dimensions, letters of a name, tensors, bytes of a header."""

    def header(names: list[str], dimensions: int = 1) -> bytes:
        entries = {
            name: {"dtype": "F16", "shape": [1] * dimensions, "data_offsets": [2 * index, 2 * index + 2]}
            for index, name in enumerate(names)
        }
        return json.dumps(entries).encode()

    assert _tensors(_file(tmp_path / "x", header(["a"], dimensions=8), b"\0" * 2)) == {"a": (1,) * 8}
    assert _tensors(_file(tmp_path / "x", header(["k" * 512]), b"\0" * 2)) is not None
    long = refusal_of(tmp_path, _raw(header(["k" * 513]), b"\0" * 2))
    assert long.startswith(f"{'k' * 119}… in x has a name of 513 characters; at most 512 are served")
    two = Limits(tensors=2)
    assert _tensors(_file(tmp_path / "x", header(["a", "b"]), b"\0" * 4), two) is not None
    three = refusal_of(tmp_path, _raw(header(["a", "b", "c"]), b"\0" * 6), two)
    assert three.startswith("x holds 3 tensors; 1 to 2 are served: ")
    short = Limits(header_bytes=len(header(["a"])))
    assert _tensors(_file(tmp_path / "x", header(["a"]), b"\0" * 2), short) is not None
    more = refusal_of(tmp_path, _raw(header(["aa"]), b"\0" * 2), short)
    assert more.startswith(f"x has a header of {short.header_bytes + 1} bytes; at most {short.header_bytes} are read")


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
        file.write((MIN_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(64 << 20)
    monkeypatch.setattr(safetensors_header, "parse_json", None)
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
        assert len(json.dumps(header)) < MIN_HEADER_BYTES / 3


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


@pytest.mark.parametrize("chunk", [4, 36, 40, 64, 1 << 20])
def test_the_hash_is_of_the_whole_file_whatever_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Several tensors, several chunks each: bytes that are read twice or at another place give another hash."""
    monkeypatch.setattr(safetensors_file, "_CHUNK_BYTES", chunk)
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(3).half(), "c": torch.randn(40).bfloat16()}
    save_file(tensors, tmp_path / "x")
    file = _open(tmp_path / "x")
    found = hash_and_check(read_header(file))
    os.close(file.descriptor)
    raw = (tmp_path / "x").read_bytes()
    assert (found.sha256, found.size) == (hashlib.sha256(raw).hexdigest(), len(raw))
    assert (found.file, found.path) == ("x", str(tmp_path / "x"))
