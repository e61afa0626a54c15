"""A base model is known by its weights, wherever they lie and however they are cut into files."""

import json
import os
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters_store.base_id import INDEX, WHOLE, base_id, fingerprint
from adapters_store.errors import BaseUnreadable

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 2}


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {f"layers.{i}.w": torch.randn(64, 64, generator=generator) for i in range(5)}
    tensors["norm"] = torch.ones(3, dtype=torch.bfloat16)
    tensors["packed"] = torch.arange(30, dtype=torch.uint8).reshape(5, 6)
    tensors["scaled"] = torch.ones(2, 2).to(torch.float8_e4m3fn)
    tensors["scale"] = torch.tensor(0.5)
    tensors["empty"] = torch.zeros(0, 4)
    return tensors


def model(directory: Path, tensors: dict[str, Tensor] | None = None, **config: object) -> Path:
    directory.mkdir()
    save_file(weights() if tensors is None else tensors, directory / WHOLE, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    return directory


def sharded(directory: Path, tensors: dict[str, Tensor], shards: int, index: bool = True) -> Path:
    directory.mkdir()
    placed: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, directory / file)
        placed |= dict.fromkeys(part, file)
    if index:
        (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def flip(file: Path, at: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def test_shards_names_and_metadata_change_nothing(tmp_path: Path) -> None:
    whole = base_id(model(tmp_path / "whole"))
    assert whole.startswith("sha256:") and len(whole) == 71
    assert base_id(sharded(tmp_path / "three", weights(), 3)) == whole
    assert base_id(sharded(tmp_path / "two", dict(reversed(weights().items())), 2, index=False)) == whole
    renamed = model(tmp_path / "renamed")
    (renamed / WHOLE).rename(renamed / "weights.safetensors")
    assert base_id(renamed) == whole
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / WHOLE).symlink_to(renamed / "weights.safetensors")  # as hub caches are
    assert base_id(tmp_path / "linked") == whole


def test_what_transformers_would_not_load_does_not_count(tmp_path: Path) -> None:
    directory = model(tmp_path / "a")
    before = base_id(directory)
    save_file({"other": torch.ones(1)}, directory / "consolidated.safetensors")
    assert base_id(directory) == before


@pytest.mark.parametrize("shards", [1, 3])
def test_one_bit_anywhere_is_another_model(tmp_path: Path, shards: int) -> None:
    directory = sharded(tmp_path / "a", weights(), shards)
    before = base_id(directory)
    for file in sorted(directory.glob("*.safetensors")):
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        for at in (header, (header + file.stat().st_size) // 2, -1):
            flip(file, at)
            assert base_id(directory) != before
            flip(file, at)
    assert base_id(directory) == before


def _renamed(tensors: dict[str, Tensor]) -> None:
    tensors["layers.0.x"] = tensors.pop("layers.0.w")


def _exchanged(tensors: dict[str, Tensor]) -> None:
    tensors["layers.0.w"], tensors["layers.1.w"] = tensors["layers.1.w"], tensors["layers.0.w"]


def _reshaped(tensors: dict[str, Tensor]) -> None:
    tensors["packed"] = tensors["packed"].reshape(6, 5)


def _of_another_type(tensors: dict[str, Tensor]) -> None:
    tensors["packed"] = tensors["packed"].view(torch.int8)


@pytest.mark.parametrize("change", [_renamed, _exchanged, _reshaped, _of_another_type])
def test_the_same_bytes_otherwise_meant_are_another_model(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None]
) -> None:
    tensors = weights()
    change(tensors)
    assert base_id(model(tmp_path / "a", tensors)) != base_id(model(tmp_path / "b"))


def test_progress_ends_at_all_bytes_and_may_be_interrupted(tmp_path: Path) -> None:
    directory = model(tmp_path / "a")
    seen: list[tuple[int, int]] = []
    base_id(directory, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and len(seen) == len(weights())
    assert seen[-1] == (sum(it.nbytes for it in weights().values()),) * 2

    def leave(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base_id(directory, leave)


def test_a_model_is_read_in_little_memory(tmp_path: Path) -> None:
    directory = model(tmp_path / "a", {f"w{i}": torch.zeros(32 << 20, dtype=torch.uint8) for i in range(4)})
    tracemalloc.start()
    try:
        base_id(directory)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20  # a buffer a thread
    finally:
        tracemalloc.stop()


# -- refusals ---


def _missing_shard(directory: Path) -> None:
    (directory / "model-00002-of-00003.safetensors").unlink()


def _cut_short(directory: Path) -> None:
    file = directory / "model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _no_header(directory: Path) -> None:
    (directory / "model-00001-of-00003.safetensors").write_bytes(b"\xff" * 100)


def _key_twice(directory: Path) -> None:
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    )
    (directory / "model-00001-of-00003.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")


def _in_two_files(directory: Path) -> None:
    (directory / INDEX).unlink()
    shutil.copy(directory / "model-00001-of-00003.safetensors", directory / "copy.safetensors")


def _misplaced(directory: Path) -> None:
    first, second = (directory / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    first.rename(directory / "x")
    second.rename(first)
    (directory / "x").rename(second)


def _outside(directory: Path) -> None:
    (directory / INDEX).write_text('{"weight_map": {"a": "../model.safetensors"}}')


def _pickle(directory: Path) -> None:
    for file in [*directory.glob("*.safetensors"), directory / INDEX]:
        file.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def _fifo(directory: Path) -> None:
    _missing_shard(directory)
    os.mkfifo(directory / "model-00002-of-00003.safetensors")


def _directory_gone(directory: Path) -> None:
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_missing_shard, "1 files that are missing .model-00002"),
        (_cut_short, "model-00001-of-00003.safetensors is not a sound safetensors file"),
        (_no_header, "its header does not fit"),
        (_key_twice, "the key 'a' twice"),
        (_in_two_files, "is in both copy.safetensors and model-00001"),
        (_misplaced, "where it is not"),
        (_outside, "which is no safetensors file"),
        (_pickle, "only pytorch_model.bin, a pickle, which is never opened: .*save_pretrained"),
        (_fifo, "not a regular file"),
        (_directory_gone, "a of the base model cannot be read: No such file"),
    ],
)
def test_what_is_no_whole_model_is_refused(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    directory = sharded(tmp_path / "a", weights(), 3)
    harm(directory)
    with pytest.raises(BaseUnreadable, match=message) as refused:
        base_id(directory)
    assert str(tmp_path) not in str(refused.value)


# -- fingerprints ---


def test_a_fingerprint_is_of_the_model_and_not_of_its_place(tmp_path: Path) -> None:
    directory = sharded(tmp_path / "a", weights(), 3)
    before = fingerprint(directory)
    assert len(before) == 64
    moved = directory.rename(tmp_path / "b")
    config = CONFIG | {"_name_or_path": "x", "transformers_version": "9", "dtype": "float16", "torch_dtype": "float32"}
    (moved / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=3))
    assert fingerprint(moved) == before


@pytest.mark.parametrize("field", ["hidden_size", "rope_theta"])
def test_another_architecture_has_another_fingerprint(tmp_path: Path, field: str) -> None:
    assert fingerprint(model(tmp_path / "a")) != fingerprint(model(tmp_path / "b", **{field: 99}))


def test_another_fine_tune_has_another_fingerprint(tmp_path: Path) -> None:
    tuned = {key: it + 1e-3 if it.dtype is torch.float32 else it for key, it in weights().items()}
    assert fingerprint(model(tmp_path / "a")) != fingerprint(model(tmp_path / "b", tuned))


def test_the_ends_of_the_data_are_looked_at(tmp_path: Path) -> None:
    directory = model(tmp_path / "a")
    before = fingerprint(directory)
    flip(directory / WHOLE, -1)
    assert fingerprint(directory) != before


def test_a_fingerprint_of_many_shards_is_quick(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.w": torch.randn(64, 1024) for i in range(160)}
    directory = sharded(tmp_path / "a", tensors, 160)
    fingerprint(directory)
    start = time.process_time()
    fingerprint(directory)
    assert time.process_time() - start < 0.15


@pytest.mark.parametrize("config", ["", "{", "[" * 100_000, None])
def test_a_model_without_configuration_has_no_fingerprint(tmp_path: Path, config: str | None) -> None:
    directory = model(tmp_path / "a")
    (directory / "config.json").unlink()
    if config is not None:
        (directory / "config.json").write_text(config)
    with pytest.raises(BaseUnreadable, match="config.json of the base model"):
        fingerprint(directory)
