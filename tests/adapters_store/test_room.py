"""What could never be on the device is refused before its bytes are read."""

import json
import struct
from pathlib import Path

import pytest

from adapters_store.errors import UnsupportedAdapter
from adapters_store.parts import MAX_RANK, ExpertReplacement, LowRank, TensorRef
from adapters_store.room import Room
from adapters_store.rules import Rules
from tests.support.adapter_files import A0, BASE, esft, lora


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
def test_what_the_device_cannot_hold_is_refused_before_its_bytes_are_read(tmp_path: Path) -> None:
    directory = lora(tmp_path / "a")
    rank = 50_000_000
    _sparse(directory / "adapter_model.safetensors", (rank, 8))  # 3.2 GB that occupy a page
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 1}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedAdapter, match="needs 3,200,000,000 bytes; all adapters together may use 1,000,000"):
        Rules(BASE, (tmp_path,), Room(1_000_000, 4, 8)).read("x", "a")


@pytest.mark.usefixtures("unread")
def test_a_rank_that_no_step_has_room_for_is_refused(tmp_path: Path) -> None:
    """What kernels keep of a step grows with it, whatever the adapter's own size."""
    directory = lora(tmp_path / "a", rank=MAX_RANK + 1)
    with pytest.raises(UnsupportedAdapter, match=r"has the rank 4,097; at most 4,096 is served: cut it by"):
        Rules(BASE, (tmp_path,), Room(1 << 40, 4, 8)).read("x", str(directory))


@pytest.mark.usefixtures("unread")
def test_more_experts_than_a_layer_has_room_for_are_refused_before_their_bytes_are_read(tmp_path: Path) -> None:
    esft(tmp_path / "a", {1: [0, 1, 2], 2: [3]})
    with pytest.raises(UnsupportedAdapter, match="tunes 3 experts of layer 1; this server has room for 2"):
        Rules(BASE, (tmp_path,), Room(1 << 30, 4, 2)).read("x", "a")


def parts(*ranks: int, experts: dict[int, int] | None = None) -> list[LowRank | ExpertReplacement]:
    """LoRAs of 10 elements a rank, and so many experts of 30 elements in each layer."""
    made: list[LowRank | ExpertReplacement] = [
        LowRank("q", TensorRef("f", "a", (rank, 6), "F32"), TensorRef("f", "b", (4, rank), "F32"), 1.0)
        for rank in ranks
    ]
    matrix = TensorRef("f", "m", (5, 2), "F16")
    for layer, count in (experts or {}).items():
        made += [ExpertReplacement(layer, expert, (matrix, matrix), matrix) for expert in range(count)]
    return made


@pytest.mark.parametrize(("bytes_per_element", "num_bytes"), [(2, 120), (4, 240)])
def test_an_adapter_may_take_all_the_room_there_is_and_no_more(bytes_per_element: int, num_bytes: int) -> None:
    """Its weights take what the device stores them in, whatever the file has."""
    adapter = parts(1, 2, experts={1: 1})  # 60 elements
    Room(num_bytes, bytes_per_element, 8).check(adapter)
    with pytest.raises(UnsupportedAdapter) as refusal:
        Room(num_bytes - 1, bytes_per_element, 8).check(adapter)
    assert str(refusal.value) == (
        f"the adapter needs {num_bytes} bytes; all adapters together may use {num_bytes - 1} (raise --adapter-bytes)"
    )


def test_experts_are_counted_by_layer() -> None:
    adapter = parts(1, experts={7: 2, 3: 3, 5: 3})
    Room(1 << 20, 4, 3).check(adapter)
    with pytest.raises(UnsupportedAdapter) as refusal:
        Room(1 << 20, 4, 2).check(adapter)
    assert str(refusal.value) == (
        "the adapter tunes 3 experts of layer 3; this server has room for 2 (--max-experts-per-adapter)"
    )
