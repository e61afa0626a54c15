"""LoRA on routed experts, layout by layout: dense changes made of the parts against those made of what is stored."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.errors import AdapterError
from adapters_store.parts import AdapterPackage, LowRank
from tests.support.adapter_files import delta, operand, read_adapter, save_peft

M, H, I = 4, 10, 6  # noqa: E741
EXPERTS = "model.layers.1.mlp.experts"
STACK = ExpertStack(M, H, I, EXPERTS)
ROUTER = "model.layers.1.mlp.gate"
BASE = BaseSpec("mixture", {"model.layers.0.self_attn.q_proj": (H, H), ROUTER: (M, H)}, {1: STACK})
GPT_OSS = BaseSpec("gpt_oss", {}, {1: ExpertStack(M, H, I, EXPERTS, transposed=True, interleaved=True, biased=True)})
SHAPES = {"gate_up_proj": (2 * I, H), "down_proj": (H, I), "gate_proj": (I, H), "up_proj": (I, H)}


def base_of(hidden: int, inner: int, **stack: Any) -> BaseSpec:
    return BaseSpec("mixture", {}, {1: ExpertStack(M, hidden, inner, EXPERTS, **stack)})


def refused(directory: Path, base: BaseSpec = BASE) -> str:
    with pytest.raises(AdapterError) as refusal:
        read_adapter(directory, base)
    return str(refusal.value)


def parts(package: AdapterPackage) -> dict[str, LowRank]:
    return {part.module: part for part in package.parts if isinstance(part, LowRank)}


def parameter(first: int, second: int, rank: int = 2) -> dict[str, torch.Tensor]:
    """A and B of a parameter that PEFT takes for [M, first, second]."""
    return {"lora_A.weight": torch.randn(M * rank, first), "lora_B.weight": torch.randn(second, rank * M)}


def at(place: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{place}.{name}": tensor for name, tensor in tensors.items()}


def change(tensors: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
    """PEFT's own formula: [M, first, second], by loops over what rows and columns are said to be."""
    a, b = (tensors[f"lora_{side}.weight"].double() for side in "AB")
    rank = a.shape[0] // M
    found = torch.zeros(M, a.shape[1], b.shape[0], dtype=torch.float64)
    for expert in range(M):
        for j in range(rank):
            found[expert] += scale * torch.outer(a[expert * rank + j], b[:, j * M + expert])
    return found


# -- one parameter for all experts ---


@pytest.mark.parametrize("hidden", [H, 2 * I, I])  # neither, or one of the two matrices, is square
@pytest.mark.parametrize("version", ["0.19.1", "0.21.2"])
@pytest.mark.parametrize("places", [("base_layer.", ""), ("", "base_layer.")])
def test_target_parameters_as_peft_writes_them(
    tmp_path: Path, places: tuple[str, str], version: str, hidden: int
) -> None:
    gate_up, down = parameter(hidden, 2 * I), parameter(I, hidden)
    tensors = at(f"{EXPERTS}.{places[0]}"[:-1], gate_up) | at(f"{EXPERTS}.{places[1]}"[:-1], down)
    package = read_adapter(save_peft(tmp_path / "a", tensors, peft_version=version), base_of(hidden, I))
    assert set(parts(package)) == {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"}
    for name, stored in (("gate_up_proj", gate_up), ("down_proj", down)):
        torch.testing.assert_close(delta(package, f"{EXPERTS}.{name}"), change(stored, 3).mT)
    assert package.notes == ()


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("place", [EXPERTS, f"{EXPERTS}.base_layer"])
def test_one_parameter_alone_is_told_by_its_shape(tmp_path: Path, name: str, place: str) -> None:
    out_features, in_features = SHAPES[name]
    stored = parameter(in_features, out_features)
    package = read_adapter(save_peft(tmp_path / "a", at(place, stored), target_parameters=[f"experts.{name}"]), BASE)
    torch.testing.assert_close(delta(package, f"{EXPERTS}.{name}"), change(stored, 3).mT)


@pytest.mark.parametrize("version", [None, "0.18.1", "0.19.0", "0.21.0"])
def test_in_and_out_exchanged_are_told_by_shape(tmp_path: Path, version: str | None) -> None:
    """PEFT before 0.19.1 takes [M, out, in] for [M, in, out]; where shapes tell, no version is asked."""
    gate_up, down = parameter(2 * I, H), parameter(H, I)
    tensors = at(f"{EXPERTS}.base_layer", gate_up) | at(EXPERTS, down)
    package = read_adapter(save_peft(tmp_path / "a", tensors, peft_version=version), BASE)
    torch.testing.assert_close(delta(package, f"{EXPERTS}.gate_up_proj"), change(gate_up, 3))
    torch.testing.assert_close(delta(package, f"{EXPERTS}.down_proj"), change(down, 3))
    assert package.notes == (
        "2 x in and out of routed experts' matrices exchanged, as PEFT before 0.19.1 writes them.",
    )


@pytest.mark.parametrize("hidden", [I, 2 * I])
@pytest.mark.parametrize("are_exchanged", [True, False])
def test_a_square_matrix_is_read_as_the_others_are(tmp_path: Path, are_exchanged: bool, hidden: int) -> None:
    shapes = {"gate_up_proj": (2 * I, hidden), "down_proj": (hidden, I)}
    stored = {name: parameter(*(shape if are_exchanged else shape[::-1])) for name, shape in shapes.items()}
    tensors = at(f"{EXPERTS}.base_layer", stored["gate_up_proj"]) | at(EXPERTS, stored["down_proj"])
    package = read_adapter(save_peft(tmp_path / "a", tensors), base_of(hidden, I))
    for name, it in stored.items():
        expected = change(it, 3) if are_exchanged else change(it, 3).mT
        torch.testing.assert_close(delta(package, f"{EXPERTS}.{name}"), expected)


@pytest.mark.parametrize(
    ("version", "is_transposed", "is_exchanged"),
    [
        ("0.17.1", False, True), ("0.18.1", False, True), ("0.18.2.dev0@abc", False, True), ("0.19.0", False, True),
        ("0.19.1", False, False), ("0.19.2.dev0", False, False), ("0.21.2", False, False), ("1.0.0", False, False),
        ("0.19.1.dev0", False, None), (None, False, None), ("mine", False, None), (5, False, None),
        ("0.17.0", True, False), ("0.18.1", True, False), ("0.21.2", True, False), (None, True, False),
        ("0.19.0", True, None), ("0.19.1.dev0", True, None), ("mine", True, None),
    ],
)  # fmt: skip
def test_square_matrices_alone_go_by_the_version(
    tmp_path: Path, version: Any, is_transposed: bool, is_exchanged: bool | None
) -> None:
    stored, base = parameter(I, I), base_of(I, I, transposed=is_transposed, interleaved=is_transposed)
    directory = save_peft(tmp_path / "a", at(EXPERTS, stored), peft_version=version)
    if is_exchanged is None:
        message = refused(directory, base)
        assert "down_proj is square, so its shape does not tell in from out" in message
        assert "set peft_version in adapter_config.json to the version of PEFT that wrote the adapter" in message
    else:
        expected = change(stored, 3) if is_exchanged else change(stored, 3).mT
        torch.testing.assert_close(delta(read_adapter(directory, base), f"{EXPERTS}.down_proj"), expected)


def test_the_order_of_the_numbers_is_part_of_the_revision(tmp_path: Path) -> None:
    stored, base = parameter(I, I), base_of(I, I)
    revisions = {
        version: read_adapter(save_peft(tmp_path / "a", at(EXPERTS, stored), peft_version=version), base).revision
        for version in ("0.17.1", "0.18.0", "0.20.0", "0.21.2")
    }
    assert revisions["0.17.1"] == revisions["0.18.0"] != revisions["0.20.0"] == revisions["0.21.2"]


def test_patterns_match_the_parameters_name(tmp_path: Path) -> None:
    """As all-linear leaves them: the rank of gate and up together, and an alpha that keeps the scale."""
    gate_up, down = parameter(H, 2 * I, rank=4), parameter(I, H)
    tensors = at(f"{EXPERTS}.base_layer", gate_up) | at(EXPERTS, down)
    patterns = {"rank_pattern": {r".*\.gate_up_proj": 4, "experts": 9},
                "alpha_pattern": {r".*\.gate_up_proj": 12, "experts.down_proj": 8, "base_layer": 99}}  # fmt: skip
    package = read_adapter(save_peft(tmp_path / "a", tensors, **patterns), BASE)
    torch.testing.assert_close(delta(package, f"{EXPERTS}.gate_up_proj"), change(gate_up, 3).mT)
    torch.testing.assert_close(delta(package, f"{EXPERTS}.down_proj"), change(down, 4).mT)


def test_gpt_oss_has_its_parameters_the_other_way_round(tmp_path: Path) -> None:
    gate_up, down = parameter(H, 2 * I), parameter(I, H)
    tensors = at(f"{EXPERTS}.base_layer", gate_up) | at(EXPERTS, down)
    package = read_adapter(save_peft(tmp_path / "a", tensors, peft_version="0.18.0"), GPT_OSS)
    torch.testing.assert_close(delta(package, f"{EXPERTS}.gate_up_proj"), change(gate_up, 3).mT)
    torch.testing.assert_close(delta(package, f"{EXPERTS}.down_proj"), change(down, 3).mT)


@pytest.mark.parametrize(
    ("tensors", "config", "says", "remedy"),
    [
        (parameter(H + 1, 2 * I), {}, "A [8, 11] and B [12, 8] are no LoRA on 4 experts' gate_up_proj [12, 10] or",
         "serve the adapter on the base that it was trained on"),
        ({**parameter(H, 2 * I), "lora_A.weight": torch.ones(7, H)}, {}, "are no LoRA on 4", "serve the adapter"),
        ({"lora_A.weight": torch.ones(8, H)}, {}, "lora_A without lora_B", "save or copy the adapter again"),
        (parameter(H, 2 * I, rank=3), {}, "rank 3 of model.layers.1.mlp.experts.gate_up_proj, which the configuration "
         "gives 2", "if the ranks differ from one parameter to another, list them in rank_pattern"),
        (parameter(H, 2 * I), {"target_parameters": ["experts.down_proj"]}, "its shape is that of gate_up_proj, which "
         "target_parameters does not list", "list the parameter in target_parameters"),
        (parameter(H, 2 * I), {"use_dora": True}, "DoRA on routed experts", "merge the adapter into its base"),
        ({**parameter(H, 2 * I), "lora_magnitude_vector": torch.ones(12)}, {}, "DoRA on routed experts", "merge"),
    ],
)  # fmt: skip
def test_parameters_that_do_not_fit(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], says: str, remedy: str
) -> None:
    message = refused(save_peft(tmp_path / "a", at(EXPERTS, tensors), **config))
    assert says in message and f"To do: {remedy}" in message


def test_a_listed_parameter_of_experts_without_tensors_is_refused(tmp_path: Path) -> None:
    listed = ["experts.gate_up_proj", "experts.down_proj"]
    directory = save_peft(tmp_path / "a", at(EXPERTS, parameter(H, 2 * I)), target_parameters=listed)
    assert "target_parameters lists experts.down_proj, but the file has no tensors for it" in refused(directory)


def test_fewer_components_than_configured_were_pruned(tmp_path: Path) -> None:
    stored = parameter(H, 2 * I, rank=1)
    package = read_adapter(save_peft(tmp_path / "a", at(EXPERTS, stored)), BASE)
    torch.testing.assert_close(delta(package, f"{EXPERTS}.gate_up_proj"), change(stored, 3).mT)
    assert "1 x a rank below the configuration's" in package.notes[0]


# -- a name for each expert ---


def expert(number: int, name: str, rank: int = 2, matrix: str | None = None) -> dict[str, torch.Tensor]:
    out_features, in_features = SHAPES[matrix or name]
    return {
        f"{EXPERTS}.{number}.{name}.lora_A.weight": torch.randn(rank, in_features),
        f"{EXPERTS}.{number}.{name}.lora_B.weight": torch.randn(out_features, rank),
    }


def expected(tensors: dict[str, torch.Tensor], name: str, scale: float, matrix: str | None = None) -> torch.Tensor:
    found = torch.zeros(M, *SHAPES[matrix or name], dtype=torch.float64)
    for number in range(M):
        key = f"{EXPERTS}.{number}.{name}.lora_"
        if f"{key}A.weight" in tensors:
            found[number] = scale * tensors[f"{key}B.weight"].double() @ tensors[f"{key}A.weight"].double()
    return found


def test_experts_by_name_with_some_missing_and_ranks_that_differ(tmp_path: Path) -> None:
    tensors = expert(0, "gate_proj") | expert(3, "gate_proj", rank=3) | expert(1, "down_proj")
    patterns = {"rank_pattern": {"experts.3.gate_proj": 3}, "alpha_pattern": {"3.gate_proj": 9}}
    package = read_adapter(save_peft(tmp_path / "a", tensors, **patterns), BASE)
    for name in ("gate_proj", "down_proj"):
        torch.testing.assert_close(delta(package, f"{EXPERTS}.{name}"), expected(tensors, name, 3))
    assert parts(package)[f"{EXPERTS}.gate_proj"].rank == 3
    assert package.notes == (
        "6 tensors of single experts were read together, by matrix.",
        "5 x no tensors for an expert beside others of its layer that have some: it stays the base's.",
    )


def test_experts_may_have_scales_of_their_own(tmp_path: Path) -> None:
    """As ranks that differ give them, where alpha does not follow."""
    tensors = expert(0, "up_proj") | expert(2, "up_proj", rank=3) | expert(3, "up_proj")
    patterns = {"rank_pattern": {"experts.2.up_proj": 3}, "alpha_pattern": {"experts.3.up_proj": 10}}
    package = read_adapter(save_peft(tmp_path / "a", tensors, **patterns), BASE)
    wanted = expected(tensors, "up_proj", 1)
    wanted *= torch.tensor([3, 1, 2, 5])[:, None, None]
    torch.testing.assert_close(delta(package, f"{EXPERTS}.up_proj"), wanted)
    patterns["alpha_pattern"]["experts.2.up_proj"] = 9  # the largest scale is the same; the revision is not
    other = read_adapter(save_peft(tmp_path / "b", tensors, **patterns), BASE)
    assert parts(other)[f"{EXPERTS}.up_proj"].scale == parts(package)[f"{EXPERTS}.up_proj"].scale
    assert other.revision != package.revision


def test_mixtrals_names_under_transformers_4(tmp_path: Path) -> None:
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    tensors = {key: it for n in range(M) for w, name in names.items() for key, it in expert(n, w, 2, name).items()}
    gate = {f"{ROUTER}.lora_A.weight": torch.randn(2, H), f"{ROUTER}.lora_B.weight": torch.randn(M, 2)}
    renamed = {key.replace(".mlp.", ".block_sparse_moe."): tensor for key, tensor in (tensors | gate).items()}
    patterns = {"alpha_pattern": {"block_sparse_moe.experts.[0-3].w2": 10}}
    package = read_adapter(save_peft(tmp_path / "a", renamed, **patterns), BASE)
    for w, name in names.items():
        found = delta(package, f"{EXPERTS}.{name}")
        torch.testing.assert_close(found, expected(tensors, w, 5 if w == "w2" else 3, name))
    a, b = (gate[f"{ROUTER}.lora_{side}.weight"].double() for side in "AB")
    torch.testing.assert_close(delta(package, ROUTER), 3 * b @ a)
    assert package.notes == (
        "26 tensors: block_sparse_moe was read as mlp.", "24 tensors of single experts were read together, by matrix."
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "config", "says", "remedy"),
    [
        (expert(0, "gate_proj") | expert(0, "w1", 2, "gate_proj"), {}, "expert 0 has model.layers.1.mlp.experts.0."
         "gate_proj too, the same matrix", "keep one of the two"),
        (expert(M, "gate_proj"), {}, "the base has 4 experts there", "serve the adapter on the base"),
        (expert(0, "gate_proj", rank=3), {}, "gate_proj.lora_A: shape [3, 10], expected [2, 10]", "if the ranks"),
        (expert(0, "up_proj", 2, "down_proj"), {}, "expected [2, 10]", "serve the adapter on the base"),
        ({**expert(0, "gate_proj"), f"{EXPERTS}.0.gate_proj.lora_magnitude_vector": torch.ones(I)}, {"use_dora": True},
         "experts.0.gate_proj: DoRA on routed experts", "merge the adapter"),
        ({f"{EXPERTS}.{name}.lora_{side}.weight": torch.ones(2, 2) for name in ("0.w4",) for side in "AB"}, {},
         "no matrix of routed experts is called 0.w4", "name them gate_proj, up_proj and down_proj"),
        ({f"{EXPERTS}.01.w1.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, {}, "called 01.w1", "name"),
        (expert(0, "gate_proj") | at(EXPERTS, parameter(H, 2 * I)), {}, "both gate_up_proj and gate_proj, which is a"
         " part of it", "keep one of the two"),
        (at(f"{EXPERTS}.base_layer", parameter(H, 2 * I)) | at(EXPERTS, parameter(H, 2 * I)), {}, "are the same linear "
         "of this base, model.layers.1.mlp.experts.gate_up_proj", "keep one of the two"),
    ],
)  # fmt: skip
def test_experts_that_do_not_fit(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], says: str, remedy: str
) -> None:
    message = refused(save_peft(tmp_path / "a", tensors, **config))
    assert says in message and f"To do: {remedy}" in message


def test_gate_and_up_that_alternate_in_one_matrix_cannot_be_given_apart(tmp_path: Path) -> None:
    message = refused(save_peft(tmp_path / "a", expert(0, "up_proj")), GPT_OSS)
    assert "has gate and up interleaved in one matrix" in message and "To do: train gate_up_proj itself" in message
    package = read_adapter(save_peft(tmp_path / "b", down := expert(0, "down_proj")), GPT_OSS)
    torch.testing.assert_close(delta(package, f"{EXPERTS}.down_proj"), expected(down, "down_proj", 3))


# -- one matrix a name, all experts in it ---


@pytest.mark.parametrize(("count_a", "count_b"), [(M, M), (1, M), (M, 1), (1, 1)])
def test_stacks_with_a_side_that_all_share(tmp_path: Path, count_a: int, count_b: int) -> None:
    tensors = {}
    for name, matrix in {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.items():
        out_features, in_features = SHAPES[matrix]
        tensors[f"{EXPERTS}.{name}.lora_A.weight"] = torch.randn(count_a, 2, in_features)
        tensors[f"{EXPERTS}.{name}.lora_B.weight"] = torch.randn(count_b, out_features, 2)
    package = read_adapter(save_peft(tmp_path / "a", tensors, alpha_pattern={"experts.w2": 2}), BASE)
    for name, matrix in {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.items():
        a, b = (tensors[f"{EXPERTS}.{name}.lora_{side}.weight"].double() for side in "AB")
        part = parts(package)[f"{EXPERTS}.{matrix}"]
        assert operand(package, part.a).shape == a.shape and operand(package, part.b).shape == b.shape
        expected = torch.einsum("eri,eor->eoi", a.expand(M, -1, -1), b.expand(M, -1, -1)) * (1 if name == "w2" else 3)
        torch.testing.assert_close(delta(package, part.module).expand(M, -1, -1), expected)
    assert package.notes == ("6 tensors of all experts' matrices were read as Tinker and SGLang write them.",)


@pytest.mark.parametrize(
    ("a", "b", "says", "remedy"),
    [
        ((2, 2, H), (M, I, 2), "A [2, 2, 10] and B [4, 6, 2], expected [4 or 1, 2, 10] and [4 or 1, 6, 2]", "serve"),
        ((2, H), (I, 2), "A [2, 10] and B [6, 2], expected", "serve the adapter on the base"),
        ((M, 3, H), (M, I, 3), "A [4, 3, 10]", "if the ranks differ"),
        ((M, 2, H), (M, I, 1), "B [4, 6, 1]", "serve the adapter"),
    ],
)
def test_stacks_that_do_not_fit(tmp_path: Path, a: tuple[int, ...], b: tuple[int, ...], says: str, remedy: str) -> None:
    tensors = {f"{EXPERTS}.w1.lora_A.weight": torch.ones(a), f"{EXPERTS}.w1.lora_B.weight": torch.ones(b)}
    message = refused(save_peft(tmp_path / "a", tensors))
    assert says in message and f"To do: {remedy}" in message


def test_a_matrix_in_two_layouts_is_refused(tmp_path: Path) -> None:
    together = {f"{EXPERTS}.w1.lora_A.weight": torch.ones(M, 2, H), f"{EXPERTS}.w1.lora_B.weight": torch.ones(M, I, 2)}
    message = refused(save_peft(tmp_path / "a", together | expert(0, "gate_proj")))
    assert "are the same linear of this base, model.layers.1.mlp.experts.gate_proj" in message


# -- the router ---


@pytest.mark.parametrize("config", [{"target_modules": ["gate"]}, {"target_parameters": ["gate.weight"]}])
def test_the_router_is_a_linear(tmp_path: Path, config: dict[str, Any]) -> None:
    tensors = {f"{ROUTER}.lora_A.weight": torch.randn(2, H), f"{ROUTER}.lora_B.weight": torch.randn(M, 2)}
    patterns = {"alpha_pattern": {"gate": 10, "gate.weight": 8}}
    package = read_adapter(save_peft(tmp_path / "a", tensors, **patterns, **config), BASE)
    scale = 5 if "target_modules" in config else 4
    a, b = (tensors[f"{ROUTER}.lora_{side}.weight"].double() for side in "AB")
    torch.testing.assert_close(delta(package, ROUTER), scale * b @ a)


def test_experts_and_routers_of_another_base_are_told_as_such(tmp_path: Path) -> None:
    dense = BaseSpec("dense", {"model.layers.0.self_attn.q_proj": (H, H)}, {})
    tensors = expert(0, "gate_proj") | {f"{ROUTER}.lora_A.weight": torch.ones(2, H)}
    message = refused(save_peft(tmp_path / "a", tensors), dense)
    assert "2 are LoRA on routed experts, which the base does not have there" in message
    assert "LoRA on a router, which it does not have there" in message
    assert "serve the adapter on the base that it was trained on" in message
