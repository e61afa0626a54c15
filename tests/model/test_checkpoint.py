"""Broken checkpoints are refused with the file's name and what to do, before anything is built."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.model.families import UnsupportedModelError
from server.model.loader import load_model
from tests.support.tiny_models import make_model

SHARDS = "model.safetensors.index.json"


def write_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    kept = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))


def index(directory: Path) -> dict[str, dict[str, str]]:
    read: dict[str, dict[str, str]] = json.loads((directory / SHARDS).read_text())
    return read


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is missing": (lambda it: sorted(it.glob("*.safetensors"))[1].unlink(), "names model-00002-of-"),
    "a shard is cut": (lambda it: sorted(it.glob("*.safetensors"))[0].write_bytes(b"\0" * 9), "model-00001-of-"),
    "the index is no JSON": (lambda it: (it / SHARDS).write_text("{"), f"{SHARDS} of 'base' cannot be read"),
    "the index maps nothing": (lambda it: (it / SHARDS).write_text("{}"), "maps no names to files"),
    "there are no weights": (lambda it: (it / SHARDS).unlink(), "save the model as safetensors"),
    "the configuration is a list": (lambda it: (it / "config.json").write_text("[]"), "of 'base' is no object"),
    "no type": (lambda it: write_config(it, model_type=None), "names no model_type"),
    "an unknown type": (lambda it: write_config(it, model_type="llama9"), "'llama9' is not served: Transformers"),
    "a setting of another kind": (lambda it: write_config(it, hidden_size="wide"), "is not one of llama"),
    "an unknown rope": (lambda it: write_config(it, rope_parameters={"rope_type": "odd", "rope_theta": 1e4}), "'odd'"),
    "other sizes": (lambda it: write_config(it, intermediate_size=95), r"\[96, 64\] instead of \[95, 64\]"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", BROKEN)
def test_it_is_said_what_is_broken(what: str, tmp_path: Path) -> None:
    directory = tmp_path / "base"
    make_model("llama").save_pretrained(directory, max_shard_size="200KB")
    assert len(set(index(directory)["weight_map"].values())) > 2
    load_model(directory, torch.float32, lambda *_: None)
    spoil, says = BROKEN[what]
    spoil(directory)
    with pytest.raises(UnsupportedModelError, match=says) as refusal:
        load_model(directory, torch.float32, lambda *_: None)
    assert len(str(refusal.value)) < 500 and "\n" not in str(refusal.value)
