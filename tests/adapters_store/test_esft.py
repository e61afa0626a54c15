"""ESFT to its edges: which files, which names, which numbers; and that nothing is lost where two files say the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.errors import AdapterError, CoverageError, InvalidAdapter, UnsupportedAdapter
from adapters_store.formats import shards as reader
from adapters_store.parts import ExpertReplacement
from tests.support.adapter_files import (
    BASE,
    EXPERTS,
    FFN,
    HIDDEN,
    STACKS,
    edit_weights,
    esft,
    operand,
    read_adapter,
)

SHAPES = {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN)}


def key(layer: int, expert: int, matrix: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight"


def refused(directory: Path, base: BaseSpec = BASE) -> str:
    with pytest.raises(AdapterError) as refusal:
        read_adapter(directory, base)
    return str(refusal.value)


# -- names and numbers ---


def test_mixtrals_names_are_the_same_three_matrices(tmp_path: Path) -> None:
    directory = tmp_path / "a"
    directory.mkdir()
    names = {"w1": "gate", "w3": "up", "w2": "down"}
    tensors = {
        f"model.layers.1.block_sparse_moe.experts.0.{name}.weight": torch.randn(SHAPES[matrix])
        for name, matrix in names.items()
    }
    save_file(tensors, directory / "model.safetensors")
    (part,) = read_adapter(directory, BASE).parts
    assert isinstance(part, ExpertReplacement)
    assert [it.key.split(".")[-2] for it in (*part.gate_up, part.down)] == ["w1", "w3", "w2"]


@pytest.mark.parametrize("other", ["layers.1.mlp.experts.0.up_proj.weight", "model.layers.1.mlp.experts.0.w3.weight"])
def test_a_matrix_that_comes_twice_under_two_names_is_refused(tmp_path: Path, other: str) -> None:
    directory = edit_weights(esft(tmp_path / "a", {1: [0]}), lambda it: it.update({other: torch.ones(SHAPES["up"])}))
    message = refused(directory)
    assert "1 of the adapter's tensors do not fit this base (3 do)" in message
    assert ".experts.0." in message and "a second up matrix for this expert" in message


def test_the_last_expert_of_a_layer_is_one_and_the_next_is_none(tmp_path: Path) -> None:
    assert len(read_adapter(esft(tmp_path / "a", {1: [EXPERTS - 1]}), BASE).parts) == 1
    assert f"the base has {EXPERTS} experts in layer 1" in refused(esft(tmp_path / "b", {1: [EXPERTS]}))


@pytest.mark.parametrize("ids", [0, "0", {"0": 1}, None, [True], [0.0], ["0"], [-1], [10**6], [[0]]])
def test_what_is_no_list_of_expert_ids_is_refused(tmp_path: Path, ids: Any) -> None:
    message = refused(esft(tmp_path / "a", {1: [0]}, experts={"1": ids}))
    assert (
        message
        == "expert_cfg.json: layer '1' must be a number in plain digits with a list of expert ids; correct the entry"
    )


def test_the_largest_id_that_is_read_is_then_missing(tmp_path: Path) -> None:
    message = refused(esft(tmp_path / "a", {1: [0]}, experts={"1": [0, 999_999]}))
    assert "all 3 tensors of the adapter fit this base" in message
    assert "layer 1 expert 999999: gate, up, down missing or unusable. To do: copy all files of the adapter" in message


@pytest.mark.parametrize("experts", [{}, [], [[0]], None, "1", 5, False])
def test_what_maps_no_layers_is_refused(tmp_path: Path, experts: Any) -> None:
    message = refused(esft(tmp_path / "a", {1: [0]}, experts=experts))
    assert message == (
        "expert_cfg.json must map layers to lists of expert ids under 'experts': write them there, or remove the file "
        "to have them read off the tensors"
    )


def test_a_layer_may_list_nothing(tmp_path: Path) -> None:
    assert len(read_adapter(esft(tmp_path / "a", {1: [0]}, experts={"1": [0], "2": []}), BASE).parts) == 1


def test_a_long_layer_is_not_repeated_in_full(tmp_path: Path) -> None:
    message = refused(esft(tmp_path / "a", {1: [0]}, experts={"9" * 500: [0]}))
    assert f"layer '{'9' * 80}' must be" in message


@pytest.mark.parametrize("value", [True, 1, "false", []])
def test_other_modules_than_experts_are_refused_by_their_flag(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UnsupportedAdapter) as refusal:
        read_adapter(esft(tmp_path / "a", {1: [0]}, non_expert_modules=value), BASE)
    assert "an adapter that tunes modules outside the experts is not served" in str(refusal.value)
    assert str(refusal.value).endswith("tune routed experts only, or serve the tuned model as a base")


@pytest.mark.parametrize("value", [False, None])
def test_a_flag_that_is_off_says_nothing(tmp_path: Path, value: Any) -> None:
    directory = esft(tmp_path / "a", {1: [0]}, shared_experts=value, non_expert_modules=value)
    assert len(read_adapter(directory, BASE).parts) == 1


# -- shared experts ---


def with_so_many(num_shared: int) -> BaseSpec:
    return replace(BASE, experts={1: replace(STACKS[1], num_shared=num_shared)})


TWO_SHARED = with_so_many(2)


def with_shared(directory: Path, count: int = 2, **config: Any) -> Path:
    """The shared experts of layer 1, which are as wide as so many; beside routed ones."""
    tensors = {
        f"model.layers.1.mlp.shared_experts.{matrix}_proj.weight": torch.randn(
            [size * count if size == FFN else size for size in shape]
        )
        for matrix, shape in SHAPES.items()
    }
    return edit_weights(esft(directory, {1: [0]}, **config), lambda it: it.update(tensors))


def test_shared_experts_are_read_as_so_many_behind_the_routed_ones(tmp_path: Path) -> None:
    directory = with_shared(tmp_path / "a", shared_experts=True)
    stored = load_file(next(directory.glob("*.safetensors")))
    package = read_adapter(directory, TWO_SHARED)
    assert [part.expert for part in package.parts if isinstance(part, ExpertReplacement)] == [EXPERTS, EXPERTS + 1, 0]
    whole = [stored[f"model.layers.1.mlp.shared_experts.{matrix}_proj.weight"] for matrix in ("gate", "up", "down")]
    for part, rows in zip(package.parts[:2], (slice(FFN), slice(FFN, None)), strict=True):
        assert isinstance(part, ExpertReplacement)
        for its, tensor, columns in zip((*part.gate_up, part.down), whole, (False, False, True), strict=True):
            assert torch.equal(operand(package, its), tensor[:, rows] if columns else tensor[rows])
    (directory / "expert_cfg.json").unlink()
    assert len(read_adapter(directory, TWO_SHARED).parts) == 3


def test_shared_experts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    set_and_there = with_shared(tmp_path / "a", shared_experts=True)
    assert "layer 1 of the base has no shared experts that can be replaced" in refused(set_and_there)
    assert "shape [12, 8], expected [6, 8]" in refused(set_and_there, with_so_many(1))
    assert "does not say that shared experts are tuned" in refused(with_shared(tmp_path / "b"), TWO_SHARED)
    none = esft(tmp_path / "c", {1: [0]}, shared_experts=True)
    assert "shared_experts is set, and there are none" in refused(none, TWO_SHARED)
    edit_weights(set_and_there, lambda it: it.pop("model.layers.1.mlp.shared_experts.up_proj.weight"))
    assert "layer 1 shared experts: up missing or unusable" in refused(set_and_there, TWO_SHARED)
    assert "must be true or false" in refused(esft(tmp_path / "d", {1: [0]}, shared_experts=1), TWO_SHARED)


def test_shared_experts_of_some_layers_only_are_refused(tmp_path: Path) -> None:
    """A file of many was lost: the base's in those layers would be nobody's model."""
    base = replace(BASE, experts={layer: replace(STACKS[layer], num_shared=2) for layer in (1, 2)})
    message = refused(with_shared(tmp_path / "a", shared_experts=True), base)
    assert "layer 2 shared experts: gate, up, down missing or unusable" in message and "layer 1" not in message
    assert "To do: copy all files of the adapter" in message


# -- tensors ---


def test_everything_that_is_wrong_is_listed(tmp_path: Path) -> None:
    """Also what comes after a tensor that is none of an expert, and what an expert then lacks."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["a.stray"] = torch.ones(1)  # the first and the last of all keys
        tensors["z.stray"] = torch.ones(1)
        tensors[key(1, 0, "up")] = torch.ones(FFN + 1, HIDDEN)
        del tensors[key(2, 3, "down")]

    message = refused(edit_weights(esft(tmp_path / "a", {1: [0, 1], 2: [3]}), change))
    assert message.startswith("7 of the adapter's tensors do not fit this base (3 do): ")
    for says in (
        "a.stray: not an expert's gate, up or down matrix but a module outside the experts",
        "z.stray: not an expert's",
        f"{key(1, 0, 'up')}: shape [7, 8], expected [6, 8]",
        "layer 1 expert 0: up missing or unusable",
        "layer 2 expert 3: down missing or unusable",
    ):
        assert says in message
    for remedy in (
        "tune experts only",
        "serve the adapter on the base that it was trained on",
        "copy all files of the adapter, or list in expert_cfg.json only what was tuned",
    ):
        assert message.count(f"To do: {remedy}") == 1


@pytest.mark.parametrize("matrix", SHAPES)
def test_each_matrix_has_its_own_shape(tmp_path: Path, matrix: str) -> None:
    turned = SHAPES[matrix][::-1]
    directory = edit_weights(
        esft(tmp_path / "a", {1: [0]}), lambda it: it.update({key(1, 0, matrix): torch.ones(turned)})
    )
    assert f"shape {list(turned)}, expected {list(SHAPES[matrix])}" in refused(directory)


def test_experts_of_another_layout_are_not_replaced(tmp_path: Path) -> None:
    base = BaseSpec(
        "gpt_oss", {}, {1: ExpertStack(EXPERTS, HIDDEN, FFN, "model.layers.1.mlp.experts", True, True, True)}
    )
    message = refused(esft(tmp_path / "a", {1: [0]}), base)
    assert "experts of gpt_oss have another layout than ESFT's gate, up and down" in message
    assert "To do: train a LoRA on them (PEFT: target_parameters)" in message


def test_the_base_that_needs_experts_is_named(tmp_path: Path) -> None:
    message = refused(esft(tmp_path / "a", {1: [0]}), BaseSpec("llama", {}, {}))
    assert message == (
        "an ESFT adapter needs a mixture-of-experts base; this one is llama: serve the adapter on "
        "the base that it was trained on"
    )


# -- files ---


def shards(directory: Path, count: int) -> Path:
    """A tensor a file: those of two experts, and then strays."""
    directory.mkdir()
    keys = [key(1, expert, matrix) for expert in range(2) for matrix in SHAPES]
    for number in range(count):
        name = keys[number] if number < len(keys) else f"stray.{number}"
        shape = SHAPES[name.split(".")[-2].removesuffix("_proj")] if number < len(keys) else (1,)
        save_file({name: torch.ones(shape)}, directory / f"{number:04}.safetensors")
    return directory


def test_an_adapter_may_lie_in_many_files_and_no_more_than_are_held_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_SHARDS", 6)
    assert len(read_adapter(shards(tmp_path / "six", 6), BASE).parts) == 2
    message = refused(shards(tmp_path / "seven", 7))
    assert message == "there are 7 .safetensors files; at most 6 are served: save the adapter in fewer"


def test_a_tensor_in_two_files_is_refused_with_both(tmp_path: Path) -> None:
    directory = esft(tmp_path / "a", {1: [0]})
    save_file({key(1, 0, "up"): torch.ones(SHAPES["up"])}, directory / "more.safetensors")
    assert refused(directory) == (
        f"{key(1, 0, 'up')} is in both model-00001-of-000001.safetensors and more.safetensors: remove the file that "
        "does not belong to the adapter"
    )


def test_a_configuration_alone_is_no_adapter(tmp_path: Path) -> None:
    directory = esft(tmp_path / "a", {1: [0]})
    (directory / "model-00001-of-000001.safetensors").unlink()
    with pytest.raises(
        InvalidAdapter, match=r"^there are no \.safetensors files beside expert_cfg\.json: copy them there; pickles"
    ):
        read_adapter(directory, BASE)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": None}, {"metadata": {}}])
def test_an_index_without_its_map_is_refused(tmp_path: Path, index: dict[str, Any]) -> None:
    directory = esft(tmp_path / "a", {1: [0]})
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refused(directory) == (
        "model.safetensors.index.json has no weight_map; write the index again, or remove it: the files themselves say "
        "what they hold"
    )


def test_too_many_tensors_are_counted_over_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters_store.limits.MAX_TENSORS", 6)
    assert len(read_adapter(shards(tmp_path / "six", 6), BASE).parts) == 2
    assert refused(shards(tmp_path / "seven", 7)).startswith("the adapter holds 7 tensors; 1 to 6 are served: ")


@pytest.mark.parametrize("name", ["run_ep3", "_ep0", "a\n_ep1"])
def test_one_rank_is_known_by_the_end_of_its_name(tmp_path: Path, name: str) -> None:
    directory = esft(tmp_path / name, {1: [0]})
    (directory / "expert_cfg.json").unlink()
    message = refused(directory)
    assert "one rank of an expert-parallel run" in message
    assert message.endswith(
        "put the safetensors files of all ranks into one directory, or beside this one's write the expert_cfg.json "
        "that lists every tuned expert"
    )


@pytest.mark.parametrize("name", ["run_ep", "run_ep3b", "step3", "run_EP3"])
def test_other_names_are_no_ranks(tmp_path: Path, name: str) -> None:
    directory = esft(tmp_path / name, {1: [0]})
    (directory / "expert_cfg.json").unlink()
    assert len(read_adapter(directory, BASE).parts) == 1


def test_ranks_below_a_directory_are_counted_and_the_first_named(tmp_path: Path) -> None:
    for rank in (1, 0, 2):
        esft_dir = tmp_path / "run" / f"last_ep{rank}"
        esft_dir.mkdir(parents=True)
    (tmp_path / "run" / "logs").mkdir()
    assert refused(tmp_path / "run") == (
        "'run' holds 3 directories of an expert-parallel run (last_ep0, …) and no weights: put the safetensors files "
        "of all ranks into this directory"
    )


def test_coverage_is_what_an_unlisted_expert_lacks(tmp_path: Path) -> None:
    with pytest.raises(CoverageError, match="does not list expert 1 of layer 2"):
        read_adapter(esft(tmp_path / "a", {1: [0], 2: [1]}, experts={"1": [0]}), BASE)
