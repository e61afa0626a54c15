"""Names of other wrappers, tools and versions: what they are read as, what is said about it, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.errors import AdapterError, CoverageError, InvalidAdapter
from adapters_store.parts import AdapterPackage, LowRank
from tests.support.adapter_files import (
    BASE,
    LINEARS,
    delta,
    edit_weights,
    lora,
    read_adapter,
    save_peft,
)

PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"


def renamed(directory: Path, change: Callable[[str], str], **config: Any) -> Path:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[change(key)] = tensors.pop(key)

    return edit_weights(lora(directory, **config), rename)


def refused(directory: Path, base: BaseSpec = BASE) -> str:
    with pytest.raises(AdapterError) as refusal:
        read_adapter(directory, base)
    return str(refusal.value)


def scales(package: AdapterPackage) -> dict[str, float]:
    return {part.module: part.scale for part in package.parts if isinstance(part, LowRank)}


CASES = {
    "none": (lambda key: key.removeprefix(PREFIX),
             "12 tensors: the prefix base_model.model. is missing, and was taken as meant."),
    "twice": (lambda key: PREFIX + key,
              "12 tensors: the prefix base_model.model. stands there more than once, and was read as one."),
    "compiled before PEFT": (lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
                             "12 tensors: _orig_mod. in the name was left out."),
    "compiled after PEFT": (lambda key: f"_orig_mod.{key}", "12 tensors: _orig_mod. in the name was left out."),
    "FSDP": (lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
             "6 tensors: _fsdp_wrapped_module. in the name was left out."),
    "checkpoints": (lambda key: key.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
                    "6 tensors: _checkpoint_wrapped_module. in the name was left out."),
    "multimodal": (lambda key: key.replace("model.layers", "model.language_model.layers"),
                   "12 tensors: the prefix model.language_model. was read as model."),
    "multimodal under Transformers 4": (lambda key: key.replace("model.layers", "language_model.model.layers"),
                                        "12 tensors: the prefix language_model.model. was read as model."),
    "text model": (lambda key: key.replace("model.layers", "model.text_model.layers"),
                   "12 tensors: the prefix model.text_model. was read as model."),
    "without a head": (lambda key: key.replace("model.model.layers", "model.layers"),
                       "12 tensors: no prefix was read as model."),
    "Tinker": (lambda key: key.replace(".self_attn.", ".attn."), "6 tensors: attn was read as self_attn."),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_names_of_another_kind_are_read_with_a_note(tmp_path: Path, case: str) -> None:
    torch.manual_seed(0)
    plain = read_adapter(lora(tmp_path / "plain"), BASE)
    torch.manual_seed(0)
    change, note = CASES[case]
    package = read_adapter(renamed(tmp_path / "a", change), BASE)
    assert set(scales(package)) == set(LINEARS)
    for module in LINEARS:
        assert torch.equal(delta(package, module), delta(plain, module))
    assert package.notes == (note,) and plain.notes == ()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("language_model.lm_head", "lm_head"), ("model.unembed_tokens", "lm_head"),
        ("model.layers.0.mlp.router", "model.language_model.layers.0.mlp.router"),
        ("model.layers.0.self_attn.c_attn", "model.layers.0.attn.c_attn"),
        ("model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"),
        ("model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"),
    ],
)  # fmt: skip
def test_the_bases_own_name_is_found_from_either_side(tmp_path: Path, theirs: str, ours: str) -> None:
    tensors = {f"{theirs}.lora_A.weight": torch.randn(2, 8), f"{theirs}.lora_B.weight": torch.randn(6, 2)}
    package = read_adapter(save_peft(tmp_path / "a", tensors), BaseSpec("x", {ours: (6, 8), "other": (1, 1)}, {}))
    assert list(scales(package)) == [ours] and package.notes[0].startswith("2 tensors: ")


def test_experts_have_other_names_too(tmp_path: Path) -> None:
    stack = ExpertStack(2, 8, 6, "model.layers.0.mlp.experts")
    tensors = {}
    for expert in range(2):
        module = f"language_model.model.layers.0.block_sparse_moe.experts.{expert}.w2"
        tensors |= {f"{module}.lora_A.weight": torch.randn(2, 6), f"{module}.lora_B.weight": torch.randn(8, 2)}
    package = read_adapter(save_peft(tmp_path / "a", tensors), BaseSpec("x", {}, {0: stack}))
    assert list(scales(package)) == ["model.layers.0.mlp.experts.down_proj"]
    assert package.notes[:2] == (
        "4 tensors: the prefix language_model.model. was read as model.",
        "4 tensors: block_sparse_moe was read as mlp.",
    )


def test_the_plain_name_wins(tmp_path: Path) -> None:
    """A base that has both names means what it says."""
    linears = {f"model.layers.0.{name}.q_proj": (8, 8) for name in ("attn", "self_attn")}
    tensors = {f"{name}.lora_{side}.weight": torch.randn(*shape) for name in linears
               for side, shape in (("A", (2, 8)), ("B", (8, 2)))}  # fmt: skip
    package = read_adapter(save_peft(tmp_path / "a", tensors), BaseSpec("x", linears, {}))
    assert set(scales(package)) == set(linears) and package.notes == ()
    for name in linears:
        a, b = (tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
        torch.testing.assert_close(delta(package, name), 3 * b @ a)


def test_a_name_that_could_be_two_modules_is_none(tmp_path: Path) -> None:
    linears = {"model.layers.0.attn.q_proj": (8, 8), "model.layers.0.self_attn.q_proj": (8, 8)}
    module = "model.language_model.layers.0.attn.q_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(8, 2)}
    message = refused(save_peft(tmp_path / "a", tensors), BaseSpec("x", linears, {}))
    assert f"the base has no linear {module}" in message and "serve the adapter on the base" in message


# -- what may be two models ---


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace("model.layers.0", "model.language_model.layers.0"),
        lambda key: key.replace("model.model.layers.1", "model.layers.1"),
        lambda key: key.removeprefix(PREFIX) if "up_proj" in key else key,
        lambda key: PREFIX + key if "layers.2" in key else key,
    ],
)
def test_layers_under_two_prefixes_are_refused(tmp_path: Path, change: Callable[[str], str]) -> None:
    directory = renamed(tmp_path / "a", change)
    with pytest.raises(InvalidAdapter, match="names layers in two ways, .* keep the tensors of the one that is served"):
        read_adapter(directory, BASE)


def test_one_module_under_two_names_is_refused(tmp_path: Path) -> None:
    def again(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "layers.0.self_attn" in key]:
            tensors[key.replace(".self_attn.", ".attn.")] = tensors[key].clone()

    with pytest.raises(CoverageError) as refusal:
        read_adapter(edit_weights(lora(tmp_path / "a"), again), BASE)
    message = str(refusal.value)
    assert "model.layers.0.attn.q_proj" in message and f"are the same linear of this base, {Q0}" in message
    assert "To do: keep one of the two" in message


def test_the_image_part_is_still_refused(tmp_path: Path) -> None:
    def change(key: str) -> str:
        return key.replace("model.layers.2.", "model.vision_tower.layers.2.").replace("model.layers", "model.layers")

    message = refused(renamed(tmp_path / "a", change))
    assert "model.vision_tower.layers.2." in message and "is not zero" in message
    assert "a multimodal model's part for images or sound" in message
    assert "target_modules that match the text part" in message


# -- what patterns match: names of the file ---

FULL = {"alpha_pattern": {rf"^{Q0}": 10}}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"^model\.language_model\.layers\.0\.self_attn\.q_proj", 5),  # the file's own name
        (r"language_model\.layers\.0\.self_attn\.q_proj", 5),
        (r"layers\.0\.self_attn\.q_proj", 5),
        (r"^model\.layers\.0\.self_attn\.q_proj", 3),  # the base's name: PEFT knew none such
        (r"model\.layers\.0\.self_attn\.q_proj", 3),
    ],
)
def test_patterns_match_the_files_names(tmp_path: Path, pattern: str, expected: float) -> None:
    directory = renamed(
        tmp_path / "a", lambda key: key.replace("model.layers", "model.language_model.layers"),
        alpha_pattern={pattern: 10},
    )  # fmt: skip
    assert scales(read_adapter(directory, BASE))[Q0] == expected


def test_a_missing_prefix_is_no_part_of_the_name(tmp_path: Path) -> None:
    directory = renamed(tmp_path / "a", lambda key: key.removeprefix(PREFIX), **FULL)
    assert scales(read_adapter(directory, BASE))[Q0] == 5


def test_a_wrapper_may_have_come_before_peft_or_after_it(tmp_path: Path) -> None:
    """Patterns that give the same either way are followed, others are refused."""

    def wrapped(key: str) -> str:
        return key.replace("layers.0.", "layers.0._orig_mod.")

    same = {"alpha_pattern": {r"layers\.0\.(_orig_mod\.)?self_attn\.q_proj": 10}}
    assert scales(read_adapter(renamed(tmp_path / "a", wrapped, **same), BASE))[Q0] == 5
    message = refused(renamed(tmp_path / "b", wrapped, alpha_pattern={"layers.0.self_attn.q_proj": 10}))
    assert "PEFT may have known model.layers.0._orig_mod.self_attn.q_proj by that name or as" in message
    assert message.endswith("write patterns that match both, or rename the tensors")


def test_a_target_that_the_file_has_under_another_name_is_there(tmp_path: Path) -> None:
    for target in ("q_proj", "attn.q_proj", "self_attn.q_proj"):
        directory = renamed(tmp_path / "a", lambda key: key.replace(".self_attn.", ".attn."), target_modules=[target])
        assert len(read_adapter(directory, BASE).parts) == len(LINEARS)
    directory = renamed(
        tmp_path / "b", lambda key: key.replace(".self_attn.", ".attn."), modules=("self_attn.q_proj",),
        target_modules=["q_proj", "up_proj"],
    )  # fmt: skip
    message = refused(directory)
    assert "target_modules lists up_proj, but the file has no tensors for it" in message
    assert "To do: copy the whole file, or take out of target_modules what was not trained" in message


def test_names_that_are_long_and_odd_cost_nothing(tmp_path: Path) -> None:
    steps = ".".join(["_orig_mod", "attn"] * 29)
    names = {f"{number}.{steps}.lora_A.lora_A.lora_A.weight": torch.zeros(1, 1) for number in range(1500)}
    message = refused(save_peft(tmp_path / "a", names))
    assert "1500 of the adapter's tensors" in message


def with_images(directory: Path, b: float, modules: tuple[str, ...] = ("self_attn.q_proj",)) -> Path:
    """LoRA on the text part, and on an image part that was left as it began, or was not."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        module = "base_model.model.model.visual.blocks.0.attn.q_proj"
        tensors[f"{module}.lora_A.weight"] = torch.ones(2, 5)
        tensors[f"{module}.lora_B.weight"] = torch.full((5, 2), b)

    return edit_weights(lora(directory, modules=modules), add)


def test_an_image_part_that_was_not_trained_changes_nothing(tmp_path: Path) -> None:
    package = read_adapter(with_images(tmp_path / "a", 0.0), BASE)
    assert {part.module.rpartition(".")[2] for part in package.parts if isinstance(part, LowRank)} == {"q_proj"}
    assert package.notes == (
        "1 x a multimodal model's part for images or sound with a B of zero, which changes nothing.",
    )


@pytest.mark.parametrize("b", [1.0, -1e-30])
def test_an_image_part_that_was_trained_is_refused(tmp_path: Path, b: float) -> None:
    with pytest.raises(AdapterError, match="visual.blocks.0.attn.q_proj.lora_B.weight acts on a part .* is not zero"):
        read_adapter(with_images(tmp_path / "a", b), BASE)


def test_an_image_part_alone_is_no_adapter_of_the_text(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="a multimodal model's part for images or sound"):
        read_adapter(with_images(tmp_path / "a", 0.0, modules=()), BASE)
