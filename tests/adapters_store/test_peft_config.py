"""PEFT's configuration to its edges: numbers, patterns, and values that are shown without being repeated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapters_store.errors import AdapterError, InvalidAdapter
from adapters_store.formats import peft_config
from adapters_store.parts import AdapterPackage, LowRank
from tests.support.adapter_files import BASE, HIDDEN, LAYERS, LINEARS, NESTED_CONFIG, edit_weights, lora, read_adapter

Q0, Q0_A = "model.layers.0.self_attn.q_proj", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def refused(directory: Path) -> str:
    with pytest.raises(AdapterError) as refusal:
        read_adapter(directory, BASE)
    return str(refusal.value)


def scales(package: AdapterPackage) -> dict[str, float]:
    return {part.module: part.scale for part in package.parts if isinstance(part, LowRank)}


# -- numbers ---


def test_a_rank_of_one_is_the_least(tmp_path: Path) -> None:
    assert set(scales(read_adapter(lora(tmp_path / "a", rank=1), BASE)).values()) == {6.0}
    for config in ({"r": 0}, {"r": -1}, {"rank_pattern": {"q_proj": 0}}):
        message = refused(lora(tmp_path / "b", **config))
        assert message == (
            "adapter_config.json: r and rank_pattern must be at least 1 and at most 2,147,483,648: write the ranks of "
            "the tensors"
        )


def test_the_largest_rank_is_read_and_tensors_of_a_lower_one_were_pruned(tmp_path: Path) -> None:
    assert set(scales(read_adapter(lora(tmp_path / "a", r=1 << 31), BASE)).values()) == {6 / (1 << 31)}
    assert "at most 2,147,483,648" in refused(lora(tmp_path / "b", r=(1 << 31) + 1))


@pytest.mark.parametrize("config", [{"lora_alpha": 1e9}, {"lora_alpha": -1e9}, {"alpha_pattern": {"q_proj": 1e9}}])
def test_a_large_alpha_is_read_and_a_larger_one_is_not(tmp_path: Path, config: dict[str, Any]) -> None:
    small = edit_weights(lora(tmp_path / "a", **config), _shrink)  # for outputs that a model can bear
    assert max(map(abs, scales(read_adapter(small, BASE)).values())) == 5e8
    larger = json.loads(json.dumps(config).replace("1000000000.0", "1000000001.0"))
    message = refused(lora(tmp_path / "b", **larger))
    assert message == "adapter_config.json: lora_alpha and alpha_pattern must be at most 1e+09: scale B instead"


def _shrink(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        tensor *= 1e-6


def test_patterns_of_both_kinds_are_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_config, "_MAX_PATTERNS", 5)
    two, three = ({f"x{number}": 2 for number in range(count)} for count in (2, 3))
    assert read_adapter(lora(tmp_path / "a", rank_pattern=two, alpha_pattern=three), BASE)
    message = refused(lora(tmp_path / "b", rank_pattern=three, alpha_pattern=three))
    assert message.startswith("adapter_config.json: 6 patterns; at most 5 are read: a regular expression may stand for")


@pytest.mark.parametrize("value", [2.0, "2", True, [2], None])
def test_a_rank_is_a_whole_number(tmp_path: Path, value: Any) -> None:
    assert refused(lora(tmp_path / "a", r=value)).startswith("adapter_config.json: ")
    assert refused(lora(tmp_path / "b", rank_pattern={"q_proj": value})).startswith("adapter_config.json: ")


def test_a_value_is_looked_into_no_deeper_than_its_type_goes(tmp_path: Path) -> None:
    directory = lora(tmp_path / "a")
    (directory / "adapter_config.json").write_text(NESTED_CONFIG)
    assert refused(directory) == (
        "adapter_config.json: Expected `int`, got `object` - at `$.rank_pattern[...]`; correct the key, or save the "
        "adapter again with PEFT"
    )


# -- patterns ---


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_the_pattern_that_cannot_be_used_is_told_by_its_number_and_not_repeated(tmp_path: Path, name: str) -> None:
    message = refused(lora(tmp_path / "a", **{name: {"q_proj": 2, "s3cret(((": 2, "up_proj": 2}}))
    assert message == (
        f"pattern number 2 of {name} in adapter_config.json cannot be used: it is no regular expression, or a match "
        "takes more than 0.1 s; write the module's name instead"
    )


def test_a_pattern_whose_match_never_ends_is_told_by_its_number(tmp_path: Path) -> None:
    slow = "(.|..|...)+(.|..|...)+(?<=!)"
    message = refused(lora(tmp_path / "a", alpha_pattern={"nothing": 2, slow: 2}))
    assert message.startswith("pattern number 2 of alpha_pattern in adapter_config.json cannot be used")


def test_the_first_pattern_that_matches_the_end_of_a_name_counts(tmp_path: Path) -> None:
    patterns = {"proj": 99, "0.self_attn.q_proj": 10, r"\d+\.self_attn\.q_proj": 20, "q_proj": 30, ".*": 40}
    found = scales(read_adapter(lora(tmp_path / "a", alpha_pattern=patterns), BASE))
    assert {module: 2 * scale for module, scale in found.items()} == {
        module: 10 if module == Q0 else 20 if "q_proj" in module else 40 for module in LINEARS
    }


@pytest.mark.parametrize("target", ["(((", "(.|..|...)+(.|..|...)+(?<=!)"])
def test_targets_that_are_no_usable_expression_are_refused_without_being_repeated(tmp_path: Path, target: str) -> None:
    directory = lora(tmp_path / "a", target_modules=target, target_parameters=["q_proj.weight"])
    assert refused(directory) == (
        "target_modules in adapter_config.json cannot be used as a regular expression: list the modules' names instead"
    )


# -- what is shown ---


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (["s3cret"], "(a list)"), ({"s3cret": 1}, "(an object)"), ({}, "(an object)"),
        (5, "5"), (2.5, "2.5"), (True, "True"), (10**200, f"{10**118}…"),
    ],
)  # fmt: skip
def test_a_value_is_shown_where_it_can_be_nobodys_text(tmp_path: Path, value: Any, shown: str) -> None:
    assert refused(lora(tmp_path / "a", unknown=value)).startswith(
        f"unknown = {shown} in adapter_config.json is not known, so it may change what the adapter computes: "
    )


@pytest.mark.parametrize("value", [None, False, []])
def test_a_key_that_is_off_says_nothing(tmp_path: Path, value: Any) -> None:
    assert len(read_adapter(lora(tmp_path / "a", use_dora=value, unknown=value), BASE).parts) == 2 * LAYERS


@pytest.mark.parametrize("value", [5, ["LORA"], {"a": 1}, True])
def test_a_type_that_is_no_text_is_no_type(tmp_path: Path, value: Any) -> None:
    message = refused(lora(tmp_path / "a", peft_type=value))
    assert message.endswith("LORA is: without the key it is not PEFT's format; convert the adapter to that")


def test_a_base_that_was_changed_says_what_to_do(tmp_path: Path) -> None:
    assert refused(lora(tmp_path / "b", init_lora_weights="PiSSA_niter_4")) == (
        "init_lora_weights 'pissa' also changed the base weights; save it as a plain LoRA first (PEFT: "
        "path_initial_model_for_weight_conversion)"
    )


# -- tensors ---


def test_the_missing_side_is_named_whichever_it_is(tmp_path: Path) -> None:
    for there, missing in (("A", "B"), ("B", "A")):
        key = Q0_A.replace("lora_A", f"lora_{missing}")
        directory = edit_weights(lora(tmp_path / there), lambda it, key=key: it.pop(key))  # type: ignore[misc]
        assert f"{Q0}: lora_{there} without lora_{missing}" in refused(directory)


def test_a_rank_of_its_own_must_be_listed(tmp_path: Path) -> None:
    directory = edit_weights(lora(tmp_path / "a"), lambda it: it.update({Q0_A: torch.ones(3, HIDDEN)}))
    message = refused(directory)
    assert f"{Q0}.lora_A: shape [3, 8], expected [2, 8]" in message
    assert message.endswith("To do: if the ranks differ from module to module, list them in rank_pattern")


@pytest.mark.parametrize("module", ["mlp.experts", "mlp.experts.base_layer", "mlp.experts.3.gate_proj"])
@pytest.mark.parametrize(("count", "more"), [(1, ""), (2, ", …")])
def test_lora_on_routed_experts_of_another_base_is_counted_and_the_first_named(
    tmp_path: Path, module: str, count: int, more: str
) -> None:
    keys = [f"base_model.model.model.layers.0.{module}.lora_{side}.weight" for side in "AB"][:count]
    directory = edit_weights(lora(tmp_path / "a"), lambda it: it.update({key: torch.ones(2, 8) for key in keys}))
    told = f"{count} are LoRA on routed experts, which the base does not have there ({keys[0]}{more}). To do: serve"
    assert told in refused(directory)


def test_at_most_four_names_of_adapters_are_told(tmp_path: Path) -> None:
    directory = lora(tmp_path / "a")
    names = ["e", "d", "c", "b", "a"]
    keys = [f"base_model.model.{module}.lora_A.{name}.weight" for module, name in zip(LINEARS, names, strict=False)]
    save_file({key: torch.ones(2, 8) for key in keys}, directory / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapter) as refusal:
        read_adapter(directory, BASE)
    assert str(refusal.value) == (
        "the file holds tensors of more than one adapter (1 of 'a', 1 of 'b', 1 of 'c', 1 of 'd'): "
        "save each adapter in a directory of its own (PEFT: save_pretrained with selected_adapters)"
    )


def test_a_side_that_comes_twice_comes_under_two_names(tmp_path: Path) -> None:
    twice = Q0_A.replace(".weight", ".other.weight")
    directory = edit_weights(lora(tmp_path / "a"), lambda it: it.update({twice: torch.ones(2, HIDDEN)}))
    assert "more than one adapter (1 of 'other', 12 without a name)" in refused(directory)


def test_weights_that_are_missing_or_beside_are_told_by_name(tmp_path: Path) -> None:
    directory = lora(tmp_path / "a")
    (directory / "expert_cfg.json").write_text("{}")
    assert refused(directory).endswith("remove it, or move it to a directory of its own if it is another adapter")
    (directory / "expert_cfg.json").unlink()
    (directory / "adapter_model.safetensors").unlink()
    assert refused(directory) == "adapter_model.safetensors is missing: copy it beside adapter_config.json"


def test_the_scales_are_part_of_the_revision_and_their_order_is_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    directory = lora(tmp_path / "a", alpha_pattern={"q_proj": 10, "up_proj": 20})
    revision = read_adapter(directory, BASE).revision
    config = json.loads((directory / "adapter_config.json").read_text())
    for alphas, is_same in (({"up_proj": 20, "q_proj": 10}, True), ({"q_proj": 20, "up_proj": 10}, False)):
        (directory / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": alphas}))
        assert (read_adapter(directory, BASE).revision == revision) is is_same


@pytest.mark.parametrize("init", ["brand_new", "PiSSA", "loftq", "corda"])
def test_a_way_to_begin_that_may_have_changed_the_base_is_refused(tmp_path: Path, init: str) -> None:
    message = refused(lora(tmp_path / "a", init_lora_weights=init))
    assert "init_lora_weights" in message and "save it as a plain LoRA first" in message and "brand_new" not in message


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_a_way_to_begin_that_left_the_base_alone_is_served(tmp_path: Path, init: object) -> None:
    assert len(read_adapter(lora(tmp_path / "a", init_lora_weights=init), BASE).parts) == 2 * LAYERS
