"""Adapter formats: what binds, what is refused, and that the refusal names what is wrong with the numbers."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.errors import AdapterError, CoverageError, InvalidAdapter, UnsupportedAdapter
from adapters_store.parts import ExpertReplacement, LowRank, describe
from tests.support.adapter_files import A0, BASE, DENSE, HIDDEN, LAYERS, edit_weights, esft, lora, read_adapter


@pytest.mark.parametrize(
    ("config", "scale"),
    [({}, 6 / 2), ({"use_rslora": True}, 6 / math.sqrt(2)), ({"alpha_pattern": {"q_proj": 10}}, 10 / 2)],
)
def test_lora_scales(tmp_path: Path, config: dict[str, Any], scale: float) -> None:
    package = read_adapter(lora(tmp_path / "a", **config), BASE)
    parts = {part.module: part for part in package.parts if isinstance(part, LowRank)}
    assert len(parts) == 2 * LAYERS and package.kind == "lora"
    assert parts["model.layers.0.self_attn.q_proj"].scale == pytest.approx(scale)
    assert describe(package)["bound_tensors"] == 4 * LAYERS


def test_patterns_pick_rank_and_alpha_as_peft_does(tmp_path: Path) -> None:
    """The first pattern that matches the end of the name wins; a full path and a regular expression are patterns."""

    def wider(tensors: dict[str, torch.Tensor]) -> None:
        tensors[A0] = torch.randn(5, HIDDEN)
        tensors[A0.replace("lora_A", "lora_B")] = torch.randn(HIDDEN, 5)

    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 5, r"layers\.\d+\.self_attn\.q_proj": 2},
                "alpha_pattern": {r".*0\.self_attn\.q_proj": 15}}  # fmt: skip
    package = read_adapter(edit_weights(lora(tmp_path / "a", **patterns), wider), BASE)
    first = next(part for part in package.parts if isinstance(part, LowRank) and ".0.self_attn" in part.module)
    assert (first.rank, first.scale) == (5, 3.0)


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_esft_binds_by_id_with_either_prefix(tmp_path: Path, prefix: str) -> None:
    package = read_adapter(esft(tmp_path / "a", {1: [3, 0], 2: [1]}, prefix=prefix), BASE)
    parts = [(part.layer, part.expert) for part in package.parts if isinstance(part, ExpertReplacement)]
    assert parts == [(1, 0), (1, 3), (2, 1)] and package.kind == "esft"
    assert describe(package)["experts"] == {"1": [0, 3], "2": [1]}


def test_esft_without_its_config_is_read_off_the_tensors(tmp_path: Path) -> None:
    directory = esft(tmp_path / "a", {1: [2]})
    (directory / "expert_cfg.json").unlink()
    (directory / "config.json").write_text("{}")  # hub adapters carry a copy of the base's
    assert len(read_adapter(directory, BASE).parts) == 1


def test_revision_is_the_content_and_the_scale_not_the_place(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = lora(tmp_path / "a")
    second = shutil.copytree(first, tmp_path / "b")
    assert read_adapter(first, BASE).revision == read_adapter(second, BASE).revision
    config = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
    assert read_adapter(first, BASE).revision != read_adapter(second, BASE).revision


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "some"}, "bias = .a text. in adapter_config.json is not served"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"a_key_of_the_future": 3}, "a_key_of_the_future"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ],
)
def test_other_arithmetic_is_refused_by_name(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=says):
        read_adapter(lora(tmp_path / "a", **config), BASE)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"r": 0}, "r and rank_pattern must be at least 1"),
        ({"r": "2"}, r"Expected `int`, got `str` - at `\$.r`"),
        ({"r": True}, r"Expected `int`, got `bool` - at `\$.r`"),
        ({"lora_alpha": None}, "missing required field `lora_alpha`"),
        ({"rank_pattern": {"(((": 2}}, "pattern number 1 of rank_pattern .* cannot be used"),
        ({"rank_pattern": {r"(.|..|...)+(.|..|...)+(?<=!)": 2}}, "pattern .* cannot be used"),  # takes for ever to fail
    ],
)
def test_broken_configurations(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    with pytest.raises(AdapterError, match=says):
        read_adapter(lora(tmp_path / "a", **config), BASE)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object, not list"),
        ('{"r": NaN}', "NaN"),
        ('{"r": 1, "r": 2}', "twice"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_broken_config_files(tmp_path: Path, text: str, says: str) -> None:
    directory = lora(tmp_path / "a")
    (directory / "adapter_config.json").write_text(text)
    with pytest.raises(InvalidAdapter, match=says):
        read_adapter(directory, BASE)


def change_lora(kind: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        match kind:
            case "unknown module":
                tensors["base_model.model.model.layers.0.mlp.nope.lora_A.weight"] = torch.zeros(2, 2)
            case "layer out of range":
                tensors["base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, HIDDEN)
            case "A without B":
                del tensors[A0.replace("lora_A", "lora_B")]
            case "wrong hidden size":
                tensors[A0] = torch.zeros(2, HIDDEN + 1)
            case "rank not as configured":
                tensors[A0] = torch.zeros(3, HIDDEN)
            case "a bias":
                tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"] = torch.zeros(HIDDEN)
            case "a magnitude":
                tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"] = torch.zeros(HIDDEN)
            case "an embedding":
                tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(2, 9)
            case "a base weight":
                tensors["base_model.model.lm_head.base_layer.weight"] = torch.zeros(9, HIDDEN)
            case "routed experts":
                tensors["base_model.model.model.layers.0.mlp.experts.lora_A.weight"] = torch.zeros(2, HIDDEN)

    return change


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("unknown module", "no linear model.layers.0.mlp.nope"),
        ("layer out of range", "no linear model.layers.99"),
        ("A without B", "lora_A without lora_B"),
        ("wrong hidden size", r"shape \[2, 9\], expected \[2, 8\]"),
        ("rank not as configured", r"shape \[3, 8\], expected \[2, 8\]"),
        ("a bias", "not the A or B"),
        ("a magnitude", "DoRA's magnitude, though use_dora is not set"),
        ("an embedding", "not the A or B"),
        ("a base weight", "save_embedding_layers"),
        ("routed experts", "routed experts"),
    ],
)
def test_every_tensor_binds_or_the_adapter_is_refused(tmp_path: Path, kind: str, says: str) -> None:
    with pytest.raises(CoverageError, match=says) as refusal:
        read_adapter(edit_weights(lora(tmp_path / "a"), change_lora(kind)), BASE)
    assert "; " not in str(refusal.value).partition(". To do")[0]  # one line: what is wrong, once


def test_a_listed_target_without_tensors_is_refused(tmp_path: Path) -> None:
    directory = lora(tmp_path / "a", modules=("self_attn.q_proj",), target_modules=["q_proj", "up_proj"])
    with pytest.raises(CoverageError, match="up_proj"):
        read_adapter(directory, BASE)


@pytest.mark.parametrize(
    ("experts", "config", "says"),
    [
        ({1: [0]}, {"shared_experts": True}, "shared_experts"),
        ({1: [0]}, {"non_expert_modules": True}, "non_expert_modules"),
        ({1: [0]}, {"experts": {}}, "must map layers to lists of expert ids"),
        ({1: [0]}, {"experts": {"x": [0]}}, "layer 'x' must be a number in plain digits"),
        ({1: [0]}, {"experts": {"1": [0, 0]}}, "twice"),
        ({1: [0]}, {"experts": {"1": [0, 1]}}, "layer 1 expert 1: gate, up, down missing"),
        ({1: [0, 1]}, {"experts": {"1": [0]}}, "does not list expert 1"),
        ({0: [0]}, {}, "layer 0 of the base has no routed experts"),
        ({1: [9]}, {}, "the base has 4 experts in layer 1"),
        ({1: [0]}, {"something": 1}, "something = 1 in expert_cfg.json is not known"),
    ],
)
def test_esft_refusals(tmp_path: Path, experts: dict[int, list[int]], config: dict[str, Any], says: str) -> None:
    with pytest.raises(AdapterError, match=says):
        read_adapter(esft(tmp_path / "a", experts, **config), BASE)


def test_esft_on_a_dense_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedAdapter, match="dense"):
        read_adapter(esft(tmp_path / "a", {1: [0]}), DENSE)


def test_esft_index_must_agree_with_the_shards(tmp_path: Path) -> None:
    directory = esft(tmp_path / "a", {1: [0]})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(InvalidAdapter, match="x in gone"):
        read_adapter(directory, BASE)


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    directory, canary = lora(tmp_path / "a"), tmp_path / "canary"
    (directory / "adapter_model.safetensors").unlink()
    torch.save(_Canary(canary), directory / "adapter_model.bin")
    with pytest.raises(InvalidAdapter, match="pickle"):
        read_adapter(directory, BASE)
    (directory / "adapter_config.json").unlink()
    with pytest.raises(InvalidAdapter, match="pickle"):
        read_adapter(directory, BASE)
    assert not canary.exists()
