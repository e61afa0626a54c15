"""What a LoRA may have beside A and B: magnitudes, biases that nothing was trained of, other ranks, shards, notes."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import AdapterError, CoverageError, InvalidAdapter, UnsupportedAdapter
from adapters_store.parts import AdapterPackage, LowRank, describe
from adapters_store.rules import Rules
from tests.support.adapter_files import (
    A0,
    BASE,
    FFN,
    HIDDEN,
    LAYERS,
    LINEARS,
    delta,
    edit_weights,
    esft,
    lora,
    operand,
    read_adapter,
)

Q0 = "model.layers.0.self_attn.q_proj"


def refused(directory: Path, base: BaseSpec = BASE, ignore_keys: tuple[str, ...] = ()) -> AdapterError:
    with pytest.raises(AdapterError) as refusal:
        read_adapter(directory, base, ignore_keys)
    return refusal.value


def part(package: AdapterPackage, module: str = Q0) -> LowRank:
    return next(it for it in package.parts if isinstance(it, LowRank) and it.module == module)


# -- DoRA ---


def dora(directory: Path, ending: str = "", **config: Any) -> Path:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        for module, (out_features, _) in LINEARS.items():
            key = f"base_model.model.{module}.lora_magnitude_vector{ending}"
            tensors[key] = torch.rand(out_features) + 1

    return edit_weights(lora(directory, **{"use_dora": True, **config}), add)


@pytest.mark.parametrize("ending", ["", ".weight"])
def test_every_linear_has_its_magnitude(tmp_path: Path, ending: str) -> None:
    directory = dora(tmp_path / "a", ending, use_rslora=True, alpha_pattern={"q_proj": 4})
    package = read_adapter(directory, BASE)
    stored = load_file(directory / "adapter_model.safetensors")
    for module in LINEARS:
        magnitude = part(package, module).magnitude
        assert magnitude is not None
        key = f"base_model.model.{module}.lora_magnitude_vector{ending}"
        assert torch.equal(operand(package, magnitude), stored[key].double())
    assert part(package).scale == pytest.approx(4 / 2**0.5)
    told = describe(package)
    assert told["bound_tensors"] == 3 * len(LINEARS) and told["linears"][Q0]["dora"] is True  # type: ignore[index]


@pytest.mark.parametrize("ending", [".default", ".default.weight"])
def test_magnitudes_with_the_adapters_name(tmp_path: Path, ending: str) -> None:
    def name(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.endswith(".weight") and "magnitude" not in key]:
            tensors[key.replace(".weight", ".default.weight")] = tensors.pop(key)

    assert part(read_adapter(edit_weights(dora(tmp_path / "a", ending), name), BASE)).magnitude is not None
    message = str(refused(dora(tmp_path / "b", ".other")))
    assert "more than one adapter (6 of 'other', 12 without a name)" in message


M0 = f"base_model.model.{Q0}.lora_magnitude_vector"


@pytest.mark.parametrize(
    ("change", "config", "says", "remedy"),
    [
        ({M0: None}, {}, f"{Q0}: no lora_magnitude_vector, though use_dora is set", "save the adapter again with PEFT"),
        ({}, {"use_dora": False}, "DoRA's magnitude, though use_dora is not set", "set use_dora to true if"),
        ({M0: torch.ones(HIDDEN + 1)}, {}, "lora_magnitude_vector: shape [9], expected [8]", "serve the adapter on"),
        (
            {M0: torch.ones(1, HIDDEN)},
            {},
            "lora_magnitude_vector: shape [1, 8], expected [8]",
            "save it with one dimension",
        ),
        (
            {A0: None, A0.replace("_A", "_B"): None},
            {},
            "lora_magnitude_vector without lora_B",
            "save or copy the adapter",
        ),
        ({f"{M0}.weight": torch.ones(HIDDEN)}, {}, "a second magnitude of the module", "keep one of the two"),
    ],
)
def test_magnitudes_that_do_not_fit(
    tmp_path: Path, change: dict[str, Any], config: dict[str, Any], says: str, remedy: str
) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for key, tensor in change.items():
            if tensor is None:
                del tensors[key]
            else:
                tensors[key] = tensor

    message = str(refused(edit_weights(dora(tmp_path / "a", **config), edit)))
    assert says in message and f"To do: {remedy}" in message


# -- biases ---


@pytest.mark.parametrize(
    ("bias", "biased", "is_served"),
    [
        ("all", (), True), ("lora_only", (), True), ("none", (Q0,), True), (None, (Q0,), True),
        ("lora_only", ("model.norm", "model.layers.0.self_attn.k_proj"), True), ("lora_only", (Q0,), False),
        ("all", ("model.norm",), False), ("all", (Q0,), False),
    ],
)  # fmt: skip
def test_biases_matter_where_there_were_any_to_train(
    tmp_path: Path, bias: str | None, biased: tuple[str, ...], is_served: bool
) -> None:
    base = msgspec.structs.replace(BASE, biased=frozenset(biased))
    directory = lora(tmp_path / "a", bias=bias)
    if is_served:
        assert len(read_adapter(directory, base).parts) == len(LINEARS)
    else:
        error = refused(directory, base)
        assert isinstance(error, UnsupportedAdapter)
        assert str(error).startswith(f"bias = {bias!r} in adapter_config.json is not served: 1 modules have a bias")
        assert biased[0] in str(error) and "train with bias='none', or merge the adapter" in str(error)


def test_a_bias_in_the_file_is_refused_whatever_the_key_says(tmp_path: Path) -> None:
    key = f"base_model.model.{Q0}.bias"
    directory = edit_weights(lora(tmp_path / "a", bias="all"), lambda it: it.update({key: torch.ones(HIDDEN)}))
    assert "a trained bias" in str(refused(directory)) and "train with bias='none'" in str(refused(directory))


# -- keys that change nothing, and keys that nobody knows ---


@pytest.mark.parametrize("config", [{"use_qalora": True}, {"fan_in_fan_out": True}, {"task_type": "CAUSAL_LM"}])
def test_flags_that_change_nothing_are_passed_over(tmp_path: Path, config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    plain = read_adapter(lora(tmp_path / "a"), BASE)
    torch.manual_seed(0)
    package = read_adapter(lora(tmp_path / "b", **config), BASE)
    assert package.revision == plain.revision and package.notes == ()


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("SEQ_2_SEQ_LM", "'SEQ_2_SEQ_LM'"),
        ("SEQ_CLS", "'SEQ_CLS'"),
        ("s3cret", "(a text)"),
        (5, "5"),
        (["x"], "(a list)"),
    ],
)
def test_a_task_is_told_of(tmp_path: Path, task: Any, told: str) -> None:
    (note,) = read_adapter(lora(tmp_path / "a", task_type=task), BASE).notes
    assert note == f"task_type is {told}; the adapter is served as CAUSAL_LM."
    head = {"base_model.model.score.weight": torch.ones(2, HIDDEN)}
    with_head = edit_weights(lora(tmp_path / "b", task_type=task), lambda it: it.update(head))
    assert "base_model.model.score.weight: not the A or B of a LoRA linear" in str(refused(with_head))
    assert "modules_to_save" in str(refused(lora(tmp_path / "c", task_type=task, modules_to_save=["score"])))


def test_unknown_texts_are_listed_by_their_keys(tmp_path: Path) -> None:
    texts = {"unsloth_version": "s3cret", "_comment": "s3cret", "megatron_core": "megatron.core"}
    (note,) = read_adapter(lora(tmp_path / "a", **texts), BASE).notes
    assert note == "adapter_config.json: unknown keys that hold a text were passed over: unsloth_version, _comment."
    many = {f"key{number}": "x" * 100_000 for number in range(9)}
    (note,) = read_adapter(lora(tmp_path / "b", **many), BASE).notes
    assert note.endswith("key6, key7 and 1 more.") and len(note) < 200


def test_a_text_of_a_key_that_is_known_is_no_note(tmp_path: Path) -> None:
    assert isinstance(refused(lora(tmp_path / "a", kasa_config="x")), UnsupportedAdapter)
    assert isinstance(refused(lora(tmp_path / "b", use_dora="yes")), InvalidAdapter)


def test_unknown_keys_are_ignored_if_named(tmp_path: Path) -> None:
    directory = lora(tmp_path / "a", lora_nums=2, other=[1], name="text", off=None)
    message = str(refused(directory))
    assert message.startswith("lora_nums = 2 in adapter_config.json is not known, so it may change what")
    assert "name it in ignore_keys (heddle serve: --ignore-key)" in message
    assert "other = (a list)" in str(refused(directory, ignore_keys=("lora_nums",)))
    package = read_adapter(directory, BASE, ("lora_nums", "other", "off", "not there"))
    assert package.notes == (
        "adapter_config.json: ignored as asked: lora_nums, other.",
        "adapter_config.json: unknown keys that hold a text were passed over: name.",
    )
    rules = Rules(BASE, (tmp_path,))
    assert rules.read("x", "a", ["lora_nums", "other"]).package.notes == package.notes
    assert rules.job("a", ["lora_nums"]).ignore_keys == ("lora_nums",)


@pytest.mark.parametrize("key", ["lora_bias", "use_dora", "r", "modules_to_save", "bias", "kasa_config"])
@pytest.mark.parametrize("value", [True, None])
def test_keys_of_the_arithmetic_cannot_be_ignored(tmp_path: Path, key: str, value: Any) -> None:
    message = str(refused(lora(tmp_path / "a", **{key: value}), ignore_keys=("x", key)))
    assert message.startswith(f"ignore_keys names {key!r}, which is no unknown key of adapter_config.json")
    assert message.endswith("take it out of ignore_keys")


def test_esft_has_unknown_keys_too(tmp_path: Path) -> None:
    directory = esft(tmp_path / "a", {1: [0]}, top_p=0.2, comment="s3cret")
    assert "top_p = 0.2 in expert_cfg.json is not known" in str(refused(directory))
    assert "name it in ignore_keys" in str(refused(directory))
    assert read_adapter(directory, BASE, ("top_p",)).notes == (
        "expert_cfg.json: ignored as asked: top_p.",
        "expert_cfg.json: unknown keys that hold a text were passed over: comment.",
    )
    assert "ignore_keys names 'shared_experts'" in str(refused(directory, ignore_keys=("shared_experts",)))


# -- ranks ---


def test_components_that_were_pruned_do_not_change_the_scale(tmp_path: Path) -> None:
    def prune(tensors: dict[str, torch.Tensor]) -> None:
        for layer in (0, 2):
            key = A0.replace("layers.0", f"layers.{layer}")
            tensors[key], other = tensors[key][:1], key.replace("_A", "_B")
            tensors[other] = tensors[other][:, :1].contiguous()

    directory = edit_weights(lora(tmp_path / "a", rank=3, lora_alpha=12), prune)
    package, stored = read_adapter(directory, BASE), load_file(directory / "adapter_model.safetensors")
    assert (part(package).rank, part(package).scale) == (1, 4)
    expected = 4 * stored[A0.replace("_A", "_B")].double() @ stored[A0].double()
    torch.testing.assert_close(delta(package, Q0), expected)
    (note,) = package.notes
    assert note.startswith("2 x a rank below the configuration's") and "rank_pattern" in note


def test_a_higher_rank_than_configured_is_refused(tmp_path: Path) -> None:
    message = str(refused(lora(tmp_path / "a", rank=3, r=2)))
    assert "shape [3, 8], expected [2, 8]" in message and "list them in rank_pattern" in message


# -- shards ---

INDEX = "adapter_model.safetensors.index.json"


def sharded(directory: Path, count: int = 3, index: bool = True) -> Path:
    whole = directory / "adapter_model.safetensors"
    tensors, weight_map = load_file(whole), {}
    whole.unlink()
    for number in range(count):
        name = f"adapter_model-{number + 1:05}-of-{count:05}.safetensors"
        shard = {key: tensors[key] for key in sorted(tensors)[number::count]}
        save_file(shard, directory / name)
        weight_map |= dict.fromkeys(shard, name)
    if index:
        (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return directory


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_read_as_one(tmp_path: Path, index: bool) -> None:
    torch.manual_seed(0)
    plain = read_adapter(lora(tmp_path / "a"), BASE)
    torch.manual_seed(0)
    package = read_adapter(sharded(lora(tmp_path / "b"), index=index), BASE)
    assert len(package.files) == 3 and len(package.parts) == len(plain.parts)
    for module in LINEARS:
        assert torch.equal(delta(package, module), delta(plain, module))


def test_shards_are_held_to_their_index_and_their_count(tmp_path: Path) -> None:
    directory = sharded(lora(tmp_path / "a"))
    second = directory / "adapter_model-00002-of-00003.safetensors"
    raw = second.read_bytes()
    second.unlink()
    assert "2 shards are there" in str(refused(directory)) and "copy those that are missing" in str(refused(directory))
    second.write_bytes(raw)
    (directory / "adapter_model-00001-of-00002.safetensors").write_bytes(raw)
    assert "which are not all of one adapter" in str(refused(directory))
    (directory / "adapter_model-00001-of-00002.safetensors").unlink()
    (directory / "other.safetensors").write_bytes(raw)
    message = str(refused(directory))
    assert (
        message.startswith("other.safetensors lies beside")
        and "00003.safetensors and its other shards alone" in message
    )
    (directory / "other.safetensors").unlink()
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][A0] = "adapter_model-00002-of-00003.safetensors"
    moved = index["weight_map"] | {A0: "elsewhere"}
    (directory / INDEX).write_text(json.dumps({"weight_map": moved}))
    assert "where it is not: copy the files that are missing" in str(refused(directory))
    del moved[A0]
    (directory / INDEX).write_text(json.dumps({"weight_map": moved}))
    assert f"{INDEX} does not list {A0}" in str(refused(directory)) and "write the index again" in str(
        refused(directory)
    )


def test_a_whole_file_beside_shards_is_refused(tmp_path: Path) -> None:
    directory = sharded(lora(tmp_path / "a"))
    (directory / "adapter_model.safetensors").write_bytes(
        (lora(tmp_path / "b") / "adapter_model.safetensors").read_bytes()
    )
    assert "lies beside adapter_config.json, and a LoRA is read from adapter_model.safetensors alone" in str(
        refused(directory)
    )


# -- what the revision is of ---


def test_a_revision_is_of_the_scales_and_not_of_notes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    directory = lora(tmp_path / "a")
    config = json.loads((directory / "adapter_config.json").read_text())
    revisions = []
    for change in ({}, {"task_type": "SEQ_CLS"}, {"comment": "x"}, {"use_rslora": True}):
        (directory / "adapter_config.json").write_text(json.dumps(config | change))
        revisions.append(read_adapter(directory, BASE).revision)
    assert revisions[0] == revisions[1] == revisions[2] != revisions[3]


def test_nothing_is_bound_halfway(tmp_path: Path) -> None:
    assert FFN != HIDDEN and len(LINEARS) == 2 * LAYERS
    directory = edit_weights(dora(tmp_path / "a"), lambda it: it.update({M0: torch.ones(1)}))
    error = refused(directory)
    assert isinstance(error, CoverageError) and str(error).startswith("3 of the adapter's tensors do not fit this base")


@pytest.mark.parametrize(
    "excluded", [["up_proj"], r".*\.up_proj", ["model.layers.1.mlp.up_proj", "mlp.up_proj"]], ids=str
)
def test_a_target_that_is_excluded_again_needs_no_tensors(tmp_path: Path, excluded: object) -> None:
    targets = ["q_proj", "up_proj"]
    path = lora(tmp_path / "a", modules=("self_attn.q_proj",), target_modules=targets, exclude_modules=excluded)
    assert {part.module.rpartition(".")[2] for part in read_adapter(path, BASE).parts} == {"q_proj"}


@pytest.mark.parametrize("excluded", [None, ["q_proj"], ["model.layers.1.mlp.up_proj"], r".*layers\.0\..*"], ids=str)
def test_a_target_of_which_some_is_left_needs_its_tensors(tmp_path: Path, excluded: object) -> None:
    path = lora(tmp_path / "a", modules=("self_attn.q_proj",), target_modules=["up_proj"], exclude_modules=excluded)
    with pytest.raises(AdapterError, match="target_modules lists up_proj, but the file has no tensors for it"):
        read_adapter(path, BASE)
