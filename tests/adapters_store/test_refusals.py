"""What a refusal says: what is wrong, with true numbers, and what to do; and what it never says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import (
    MAX_MESSAGE_BYTES,
    AdapterError,
    AdapterNotFound,
    CoverageError,
    InvalidAdapter,
    UnsupportedAdapter,
    clean,
)
from adapters_store.formats import remedies
from tests.support.adapter_files import A0, BASE, HIDDEN, LINEARS, edit_weights, esft, lora, read_adapter

Change = Callable[[dict[str, torch.Tensor]], None]


def refused(directory: Path, base: BaseSpec = BASE) -> AdapterError:
    with pytest.raises(AdapterError) as refusal:
        read_adapter(directory, base)
    assert len(str(refusal.value).encode()) <= MAX_MESSAGE_BYTES
    return refusal.value


def renamed(change: Callable[[str], str]) -> Change:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[change(key)] = tensors.pop(key)

    return rename


# -- accepted and wrong, once ---


@pytest.mark.parametrize(
    ("other", "says"), [(".other", r"6 of 'default', 6 of 'other'"), ("", r"6 of 'default', 6 without a name")]
)
def test_two_adapters_in_one_file_are_refused_with_both_names(tmp_path: Path, other: str, says: str) -> None:
    def name(key: str) -> str:
        module, side = key.removesuffix(".weight").rsplit(".", 1)
        return f"{module}.{side}{'.default' if 'q_proj' in module else other}.weight"

    with pytest.raises(InvalidAdapter, match=rf"more than one adapter \({says}\): save each adapter in a directory"):
        read_adapter(edit_weights(lora(tmp_path / "a"), renamed(name)), BASE)


def test_a_named_side_beside_an_unnamed_one_is_refused(tmp_path: Path) -> None:
    directory = edit_weights(lora(tmp_path / "a"), renamed(lambda key: key.replace("lora_A.", "lora_A.x.")))
    assert "6 of 'x', 6 without a name" in str(refused(directory))


def test_one_name_throughout_is_served(tmp_path: Path) -> None:
    directory = edit_weights(lora(tmp_path / "a"), renamed(lambda key: key.replace(".weight", ".default.weight")))
    assert len(read_adapter(directory, BASE).parts) == len(LINEARS)


@pytest.mark.parametrize("name", ["last_checkpoint_ep0", "run_ep12"])
def test_one_rank_of_an_expert_parallel_run_is_refused(tmp_path: Path, name: str) -> None:
    directory = esft(tmp_path / name, {1: [0, 2]})
    assert len(read_adapter(directory, BASE).parts) == 2  # it has an expert_cfg.json, which is complete
    (directory / "expert_cfg.json").unlink()
    message = str(refused(directory))
    assert name in message and "safetensors files of all ranks into one directory" in message
    assert "expert_cfg.json that lists every tuned expert" in message
    (tmp_path / "link").symlink_to(directory)  # by what it resolves to
    assert name in str(refused(tmp_path / "link"))
    moved = directory.rename(tmp_path / "merged")
    assert len(read_adapter(moved, BASE).parts) == 2


@pytest.mark.parametrize("config", [True, False])
def test_the_parent_of_all_ranks_is_refused_with_the_remedy(tmp_path: Path, config: bool) -> None:
    parent = tmp_path / "run"
    parent.mkdir()
    for rank in (0, 1):
        esft(parent / f"last_checkpoint_ep{rank}", {1: [rank]})
    if config:
        (parent / "expert_cfg.json").write_text('{"experts": {"1": [0, 1]}}')
    message = str(refused(parent))
    assert "2 directories of an expert-parallel run" in message and "of all ranks into this directory" in message


@pytest.mark.parametrize("name", ["expert_cfg.json", "model.safetensors", "adapter_model-2.safetensors"])
def test_files_that_would_not_be_read_are_refused_by_name(tmp_path: Path, name: str) -> None:
    directory = lora(tmp_path / "a")
    (directory / name).write_bytes((directory / "adapter_model.safetensors").read_bytes())
    message = str(refused(directory))
    assert message.startswith(f"{name} lies beside adapter_config.json") and "remove it" in message


def _index(directory: Path, **changes: Any) -> None:
    shard = next(directory.glob("*.safetensors"))
    weight_map = dict.fromkeys(load_file(shard), shard.name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map} | changes
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_esft_files_are_held_to_their_index(tmp_path: Path) -> None:
    directory = esft(tmp_path / "a", {1: [0]})
    _index(directory)
    assert len(read_adapter(directory, BASE).parts) == 1
    _index(directory, something={"a": 1})
    assert "model.safetensors.index.json has the unknown key 'something'" in str(refused(directory))
    _index(directory, weight_map={})
    assert "model-00001-of-000001.safetensors is not in model.safetensors.index.json" in str(refused(directory))
    shard = directory / "model-00001-of-000001.safetensors"
    _index(directory, weight_map=dict.fromkeys(list(load_file(shard))[1:], shard.name))
    assert "does not list" in str(refused(directory))
    _index(directory)
    save_file({"layers.1.mlp.experts.3.up_proj.weight": torch.zeros(6, 8)}, directory / "more.safetensors")
    assert "more.safetensors is not in" in str(refused(directory))


@pytest.mark.parametrize("key", ["01", "١", "+1", " 1", "1_0", "-1", "1.0", "", "1\n"])
def test_layers_are_numbers_in_plain_digits(tmp_path: Path, key: str) -> None:
    message = str(refused(esft(tmp_path / "a", {1: [0]}, experts={key: [0]})))
    assert "must be a number in plain digits" in message
    assert message.isprintable()


@pytest.mark.parametrize("layer", ["01", "١"])
def test_so_are_those_of_tensors(tmp_path: Path, layer: str) -> None:
    directory = edit_weights(esft(tmp_path / "a", {1: [0]}), renamed(lambda key: key.replace(".1.", f".{layer}.")))
    assert "3 of the adapter's tensors do not fit this base (0 do)" in str(refused(directory))


# -- what to do ---


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"bias": "some"}, r"bias = \(a text\) .*: train with bias='none'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \(a list\) .* LoRA on lm_head is served"),
        ({"lora_bias": True}, "lora_bias = True .* lora_bias=False"),
        ({"layer_replication": [[0, 2]]}, "serve it as a base of its own"),
        ({"trainable_token_indices": [1]}, "train without new tokens"),
        ({"alora_invocation_tokens": [1]}, "aLoRA acts from its invocation tokens on"),
        ({"lora_nums": 2}, r"lora_nums = 2 in .* name it in ignore_keys \(heddle serve: --ignore-key\), or remove it"),
        ({"peft_type": None}, "peft_type None .*: without the key it is not PEFT's format"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not served; LORA is: turn it into a LoRA with peft.save_as_lora"),
        ({"peft_type": "IA3"}, "'IA3' .*: merge the adapter into its base"),
        ({"peft_type": "PREFIX_TUNING"}, "'PREFIX_TUNING' .*: train a plain LoRA"),
        ({"init_lora_weights": "pissa_niter_16"}, "'pissa' .* path_initial_model_for_weight_conversion"),
    ],
)
def test_configurations_are_refused_with_the_remedy(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedAdapter, match=says):
        read_adapter(lora(tmp_path / "a", **config), BASE)


def test_every_peft_type_has_a_remedy() -> None:
    import peft

    known = remedies.CONVERTIBLE | remedies.MERGEABLE | remedies.OTHER_TYPES | {"LORA"}
    assert {it.value for it in peft.PeftType} <= known


@pytest.mark.parametrize(
    ("module", "what", "remedy"),
    [
        ("model.layers.1.mlp.gate", "LoRA on a router", "or train without the router"),
        ("model.layers.1.mlp.router", "LoRA on a router", "or train without the router"),
        ("model.layers.0.self_attn.query_key_value", "a fused linear", "split B"),
        ("model.vision_tower.layers.0.self_attn.q_proj", "part for images or sound", "text part only"),
        ("model.visual.blocks.0.attn.qkv", "part for images or sound", "text part only"),
        (
            "model.layers.77.self_attn.q_proj",
            "(a module that this base does not have)",
            "the base that it was trained on",
        ),
        ("anything", "does not have", "the base that it was trained on"),
    ],
)
def test_linears_that_the_base_has_not(tmp_path: Path, module: str, what: str, remedy: str) -> None:
    directory = lora(tmp_path / "a")
    keys = [f"base_model.model.{module}.lora_{side}.weight" for side in "AB"]
    save_file({key: torch.zeros(2, 2) for key in keys}, directory / "adapter_model.safetensors")
    message = str(refused(directory))
    assert message.startswith("2 of the adapter's tensors do not fit this base (0 do): base_model.model.")
    assert f"the base has no linear {module}" in message and what in message
    assert message.count(remedy) == 1


@pytest.mark.parametrize(
    ("key", "what", "remedy"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "LoRA on an embedding", "without embed_tokens"),
        ("base_model.model.lm_head.base_layer.weight", "a copy of a base weight", "save_embedding_layers=False"),
        ("base_model.model.lm_head.weight", "a copy of a base weight", "if it was trained or resized, merge"),
        ("base_model.model.model.layers.0.x.lora_magnitude_vector.a.b", "DoRA's magnitudes under", "save the adapter"),
        ("base_model.model.model.layers.0.x.lora_B.bias", "a LoRA's bias", "lora_bias=False"),
        ("base_model.model.model.layers.0.x.bias", "a trained bias", "bias='none'"),
        ("base_model.model.model.layers.0.x.velora_state", "but the state of another method", "train a plain LoRA"),
    ],
)
def test_tensors_that_are_no_side_of_a_lora(tmp_path: Path, key: str, what: str, remedy: str) -> None:
    directory = edit_weights(lora(tmp_path / "a"), lambda tensors: tensors.update({key: torch.zeros(2, 2)}))
    message = str(refused(directory))
    assert "1 of the adapter's tensors do not fit this base (12 do)" in message
    assert "not the A or B of a LoRA linear but" in message and what in message and remedy in message


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("model.layers.1.mlp.experts.5.gate_up_proj.weight", "split gate_up_proj into gate_proj and up_proj"),
        ("model.layers.1.mlp.experts.gate_up_proj", "split gate_up_proj into gate_proj and up_proj"),
        ("model.layers.1.mlp.experts.down_proj", "split it by expert"),
        ("model.layers.1.mlp.shared_experts.gate_up_proj.weight", "split gate_up_proj into gate_proj and up_proj"),
        ("model.layers.1.mlp.gate.weight", "tune experts only"),
    ],
)
def test_esft_tensors_that_are_no_experts_matrix(tmp_path: Path, key: str, remedy: str) -> None:
    directory = edit_weights(esft(tmp_path / "a", {1: [0]}), lambda tensors: tensors.update({key: torch.zeros(2, 2)}))
    message = str(refused(directory))
    assert message.startswith("1 of the adapter's tensors do not fit this base (3 do)")
    assert "not an expert's gate, up or down matrix but" in message and remedy in message


def test_a_directory_of_something_else_is_told_what_would_be_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert str(refused(tmp_path / "a")) == (
        "'a' holds no adapter: neither adapter_config.json (PEFT) nor expert_cfg.json or expert weights (ESFT): give "
        "the directory that holds these files themselves"
    )


def test_weights_that_training_has_blown_up_are_told_so(tmp_path: Path) -> None:
    directory = edit_weights(lora(tmp_path / "a"), lambda tensors: tensors.update({A0: torch.full((2, HIDDEN), 1e30)}))
    assert str(refused(directory)) == (
        f"{A0} holds a weight above 65,504 in size, the largest float16; training that does not diverge stays far "
        "below: take an earlier checkpoint"
    )


def test_experts_are_told_of_once(tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(30):
            for side in "AB":
                tensors[f"base_model.model.model.layers.{layer + 3}.mlp.experts.lora_{side}.weight"] = torch.zeros(2, 2)

    error = refused(edit_weights(lora(tmp_path / "a"), add))
    assert isinstance(error, CoverageError) and "; " not in str(error).partition(". To do")[0]
    assert "60 of the adapter's tensors do not fit this base (12 do): 60 are LoRA on routed experts" in str(error)
    assert str(error).endswith("To do: serve the adapter on the base that it was trained on")


def test_the_count_is_of_tensors(tmp_path: Path) -> None:
    """Pairs and targets that are missing are told of, and not counted."""
    directory = lora(tmp_path / "a", target_modules=["q_proj", "up_proj", "x"])
    whole = load_file(directory / "adapter_model.safetensors")
    edit_weights(directory, lambda tensors: [tensors.pop(key) for key in whole if "up_proj" in key])  # type: ignore[arg-type, return-value]
    assert str(refused(directory)).startswith(
        "all 6 tensors of the adapter fit this base, but it is not whole: target_modules lists up_proj"
    )
    edit_weights(directory, lambda tensors: tensors.update({A0: torch.zeros(2, HIDDEN + 1)}))
    message = str(refused(directory))
    assert message.startswith("2 of the adapter's tensors do not fit this base (4 do)")  # its B is of no use either
    assert "shape [2, 9], expected [2, 8]; target_modules lists up_proj" in message


# -- what is never said ---

SECRET = "s3cret-" * 30


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": SECRET}, {"init_lora_weights": f"pissa{SECRET}"}, {"bias": SECRET},
        {"unknown": [SECRET]}, {"unknown": {SECRET: SECRET}}, {"r": SECRET},
        {"use_rslora": SECRET}, {"rank_pattern": {f"((({SECRET}": 1}}, {"rank_pattern": {SECRET: SECRET}},
        {"target_modules": f"((({SECRET}", "target_parameters": ["q_proj.weight"]}, {"target_parameters": SECRET},
        {"lora_alpha": [SECRET]},
    ],
    ids=str,
)  # fmt: skip
def test_what_a_configuration_holds_is_not_repeated(tmp_path: Path, config: dict[str, Any]) -> None:
    assert "s3cret" not in str(refused(lora(tmp_path / "a", **config)))


@pytest.mark.parametrize("size", [10, 400, 100_000])
def test_messages_are_bounded_whatever_the_names(tmp_path: Path, size: int) -> None:
    refused(lora(tmp_path / "a", **{"k" * size: 1}))
    refused(lora(tmp_path / "b", unknown=["v" * size]))
    names = {f"{'ü' * min(size, 480)}{number}": torch.zeros(1, 1) for number in range(30)}
    message = str(refused(edit_weights(lora(tmp_path / "c"), lambda tensors: tensors.update(names))))
    assert message.endswith(remedies.for_tensor("x")[1])  # what to do is always said
    refused(esft(tmp_path / "d", {1: [0]}, experts={"9" * size: [0]}))
    assert len(str(AdapterNotFound("n" * size))) < 200


HOSTILE = "\x1b]0;title\x07\x1b[2J\r\n[/x]\u202e\ud800\x00"


def test_nothing_is_said_that_a_terminal_would_obey(tmp_path: Path) -> None:
    assert clean("plain ü 漢字 [bold] 🥐") == "plain ü 漢字 [bold] 🥐"
    assert clean(HOSTILE).isprintable() and "[2J" in clean(HOSTILE)
    assert clean("x" * 5000, 100) == "x" * 97 + "…" and len(clean("ü" * 5000, 100).encode()) == 99
    key = HOSTILE.replace("\ud800", "")
    (tmp_path / HOSTILE.replace("/", "").replace("\ud800\x00", "")).mkdir()
    for directory in (
        edit_weights(lora(tmp_path / "a"), lambda tensors: tensors.update({key: torch.zeros(1, 1)})),
        lora(tmp_path / "b", **{HOSTILE: 1}),
        esft(tmp_path / "c", {1: [0]}, experts={HOSTILE: [0]}),
        esft(tmp_path / "d", {1: [0]}, **{HOSTILE: 1}),
        tmp_path / HOSTILE.replace("/", "").replace("\ud800\x00", ""),
    ):
        assert str(refused(directory)).isprintable()
