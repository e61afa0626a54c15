"""q, k, v and gate, up, in one linear or in parts: the rows of the dense change decide."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import AdapterError
from adapters_store.parts import AdapterPackage, LowRank
from tests.support.adapter_files import delta, operand, read_adapter, save_peft

H, Q, K, I = 8, 12, 4, 6  # noqa: E741
ATTN, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
SPLIT = BaseSpec("llama", {f"{ATTN}.q_proj": (Q, H), f"{ATTN}.k_proj": (K, H), f"{ATTN}.v_proj": (K, H),
                           f"{MLP}.gate_proj": (I, H), f"{MLP}.up_proj": (I, H)}, {})  # fmt: skip
FUSED = BaseSpec("phi3", {f"{ATTN}.qkv_proj": (Q + 2 * K, H), f"{MLP}.gate_up_proj": (2 * I, H)}, {},
                 fused={f"{ATTN}.qkv_proj": (Q, K, K), f"{MLP}.gate_up_proj": (I, I)})  # fmt: skip
UNKNOWN = msgspec.structs.replace(FUSED, fused={})  # nobody has said whose rows are where
START = {"q_proj": 0, "k_proj": Q, "v_proj": Q + K, "gate_proj": 0, "up_proj": I}
WIDTH = {"q_proj": Q, "k_proj": K, "v_proj": K, "gate_proj": I, "up_proj": I}


def pair(name: str, out_features: int, rank: int = 2, dora: bool = False) -> dict[str, torch.Tensor]:
    parent = MLP if name.startswith(("gate", "up")) else ATTN
    tensors = {f"{parent}.{name}.lora_A.weight": torch.randn(rank, H),
               f"{parent}.{name}.lora_B.weight": torch.randn(out_features, rank)}  # fmt: skip
    return tensors | ({f"{parent}.{name}.lora_magnitude_vector": torch.rand(out_features) + 1} if dora else {})


def dense(tensors: dict[str, torch.Tensor], scale: float = 3) -> torch.Tensor:
    a, b = (next(it.double() for key, it in tensors.items() if f"lora_{side}" in key) for side in "AB")
    return scale * b @ a


def part(package: AdapterPackage, module: str) -> LowRank:
    return next(it for it in package.parts if isinstance(it, LowRank) and it.module == module)


def refused(directory: Path, base: BaseSpec) -> str:
    with pytest.raises(AdapterError) as refusal:
        read_adapter(directory, base)
    return str(refusal.value)


@pytest.mark.parametrize("dora", [False, True])
def test_one_in_the_file_and_parts_in_the_base(tmp_path: Path, dora: bool) -> None:
    qkv, gate_up = pair("qkv_proj", Q + 2 * K, dora=dora), pair("gate_up_proj", 2 * I, dora=dora)
    config = {"use_dora": dora, "alpha_pattern": {"qkv_proj": 10, "q_proj": 99}}
    package = read_adapter(save_peft(tmp_path / "a", qkv | gate_up, **config), SPLIT)
    assert {it.module for it in package.parts if isinstance(it, LowRank)} == set(SPLIT.linears)
    for module in SPLIT.linears:
        parent, _, name = module.rpartition(".")
        tensors, whole = (qkv, dense(qkv, 5)) if parent == ATTN else (gate_up, dense(gate_up))
        rows = slice(START[name], START[name] + WIDTH[name])
        torch.testing.assert_close(delta(package, module), whole[rows])
        magnitude = part(package, module).magnitude
        assert (magnitude is not None) is dora
        if magnitude is not None:
            stored = next(it for key, it in tensors.items() if "magnitude" in key)
            assert torch.equal(operand(package, magnitude), stored[rows].double())
    assert sorted(package.notes) == [
        "1 x gate_up_proj read as gate_proj, up_proj, by its rows.",
        "1 x qkv_proj read as q_proj, k_proj, v_proj, by its rows.",
    ]


@pytest.mark.parametrize(
    "names",
    [("q_proj",), ("k_proj",), ("v_proj",), ("q_proj", "v_proj"), ("k_proj", "v_proj"), ("q_proj", "k_proj", "v_proj"),
     ("gate_proj",), ("up_proj",), ("gate_proj", "up_proj")],
)  # fmt: skip
def test_parts_in_the_file_and_one_in_the_base(tmp_path: Path, names: tuple[str, ...]) -> None:
    ranks = {name: rank for rank, name in enumerate(names, start=1)}
    made = {name: pair(name, WIDTH[name], rank) for name, rank in ranks.items()}
    config = {"rank_pattern": ranks, "alpha_pattern": {name: 3 * rank for name, rank in ranks.items()}}
    tensors = {key: it for pairs in made.values() for key, it in pairs.items()}
    package = read_adapter(save_peft(tmp_path / "a", tensors, **config), FUSED)
    (only,) = package.parts
    assert isinstance(only, LowRank) and only.rank == sum(ranks.values())
    expected = torch.zeros(*FUSED.linears[only.module], dtype=torch.float64)
    for name, pairs in made.items():
        expected[START[name] : START[name] + WIDTH[name]] = dense(pairs)
    torch.testing.assert_close(delta(package, only.module), expected)
    fused = only.module.rpartition(".")[2]
    assert package.notes == (f"1 x {', '.join(names)} read as rows of {fused}.",)


def test_parts_may_have_scales_of_their_own(tmp_path: Path) -> None:
    made = {"q_proj": pair("q_proj", Q), "v_proj": pair("v_proj", K)}
    tensors = made["q_proj"] | made["v_proj"]
    package = read_adapter(save_peft(tmp_path / "a", tensors, alpha_pattern={"v_proj": 8}), FUSED)
    found = delta(package, f"{ATTN}.qkv_proj")
    torch.testing.assert_close(found[:Q], dense(made["q_proj"]))
    torch.testing.assert_close(found[START["v_proj"] :], dense(made["v_proj"], scale=4))


def test_magnitudes_of_all_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    made = {name: pair(name, WIDTH[name], dora=True) for name in ("v_proj", "q_proj", "k_proj")}
    tensors = {key: it for pairs in made.values() for key, it in pairs.items()}
    package = read_adapter(save_peft(tmp_path / "a", tensors, use_dora=True), FUSED)
    magnitude = part(package, f"{ATTN}.qkv_proj").magnitude
    assert magnitude is not None
    stored = [tensors[f"{ATTN}.{name}.lora_magnitude_vector"] for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(operand(package, magnitude), torch.cat(stored).double())


@pytest.mark.parametrize(
    ("tensors", "base", "config", "says", "remedy"),
    [
        (pair("q_proj", Q) | pair("v_proj", K + 1), FUSED, {},
         "v_proj.lora_B: shape [5, 2], expected [4, 2]", "serve the adapter on the base"),
        (pair("q_proj", Q - 2), FUSED, {}, "q_proj.lora_B: shape [10, 2], expected [12, 2]", "serve the adapter"),
        (pair("k_proj", K - 2), FUSED, {}, "k_proj.lora_B: shape [2, 2], expected [4, 2]", "serve the adapter"),
        (pair("v_proj", K + 1), FUSED, {}, "v_proj.lora_B: shape [5, 2], expected [4, 2]", "serve the adapter"),
        (pair("up_proj", I + 1), FUSED, {}, "up_proj.lora_B: shape [7, 2], expected [6, 2]", "serve the adapter"),
        (pair("q_proj", Q), UNKNOWN, {}, "the base has no linear", "serve the adapter"),
        (pair("q_proj", Q, dora=True), FUSED, {"use_dora": True}, "magnitudes of q_proj only, and it is one linear",
         "train with DoRA on all of q_proj, k_proj, v_proj, or merge"),
        (pair("q_proj", Q) | pair("qkv_proj", Q + 2 * K), FUSED, {}, "are the same linear of this base", "keep one of"),
        (pair("q_proj", Q) | pair("qkv_proj", Q + 2 * K), SPLIT, {}, "are the same linear of this base", "keep one of"),
        (pair("q_proj", Q) | {key.replace("self_attn", "attn"): it for key, it in pair("q_proj", Q).items()}, FUSED, {},
         "are the same rows of qkv_proj", "keep one of"),
        (pair("qkv_proj", Q + K), SPLIT, {}, "qkv_proj.lora_B: shape [16, 2], expected [20, 2]", "serve the adapter"),
        ({f"{ATTN}.q_proj.lora_A.weight": torch.ones(2, H)}, FUSED, {}, "lora_A without lora_B", "save or copy"),
        ({f"{ATTN}.q_proj.lora_B.weight": torch.ones(Q), f"{ATTN}.q_proj.lora_A.weight": torch.ones(2, H)}, FUSED, {},
         "q_proj.lora_B: shape [12]", "if the ranks differ"),
    ],
)  # fmt: skip
def test_what_cannot_be_put_together(
    tmp_path: Path, tensors: dict[str, torch.Tensor], base: BaseSpec, config: dict[str, Any], says: str, remedy: str
) -> None:
    message = refused(save_peft(tmp_path / "a", tensors, **config), base)
    assert says in message and f"To do: {remedy}" in message


def test_a_base_that_has_both_means_what_it_says(tmp_path: Path) -> None:
    both = BaseSpec("x", SPLIT.linears | FUSED.linears, {})
    package = read_adapter(save_peft(tmp_path / "a", pair("q_proj", Q) | pair("gate_up_proj", 2 * I)), both)
    assert {it.module for it in package.parts if isinstance(it, LowRank)} == {f"{ATTN}.q_proj", f"{MLP}.gate_up_proj"}
    assert package.notes == ()


def test_the_number_of_tensors_that_fit_counts_each_once(tmp_path: Path) -> None:
    stray = {"model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(2, H)}
    message = refused(save_peft(tmp_path / "a", pair("qkv_proj", Q + 2 * K) | stray), SPLIT)
    assert message.startswith("1 of the adapter's tensors do not fit this base (2 do)")
    message = refused(save_peft(tmp_path / "b", pair("q_proj", Q) | pair("v_proj", K) | stray), FUSED)
    assert message.startswith("1 of the adapter's tensors do not fit this base (4 do)")
