"""target_parameters beside patterns: PEFT matches those with the parameter's name. PEFT itself is the reference."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from adapters_store.errors import CoverageError, InvalidAdapter
from adapters_store.rules import Adapter, Rules
from server.model.probe import PROBE
from tests.support.engine_harness import Engine, prompts
from tests.support.tiny_adapters import merge, register
from tests.support.tiny_models import make_model, reference


def save(directory: Path, **config: Any) -> Path:
    lora = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config)
    wrapped = peft.get_peft_model(make_model("llama"), lora)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(wrapped.named_parameters()):
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    wrapped.save_pretrained(directory, save_embedding_layers=False)
    return directory


def read(directory: Path) -> Adapter:
    spec = Engine(make_model("llama", attention=PROBE)).assembly.info.base
    return Rules(spec, (directory.parent,)).read("x", directory.name)


BY_NAME = {"o_proj": 20.0, "q_proj": 2.0}
BY_WEIGHT = {"o_proj.weight": 12.0, r"layers\.[01]\.mlp\.down_proj\.weight": 3.0, "q_proj": 2.0}
CASES: dict[str, dict[str, Any]] = {
    "pattern by module": {"target_modules": [], "target_parameters": ["o_proj.weight"], "alpha_pattern": BY_NAME},
    "pattern by parameter": {"target_modules": [], "target_parameters": ["o_proj.weight", "down_proj.weight"],
                             "alpha_pattern": BY_WEIGHT},
    "both kinds of target": {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["o_proj.weight"],
                             "alpha_pattern": BY_NAME | BY_WEIGHT},
    "the same linears of other layers": {
        "target_modules": r"model\.layers\.[01]\.self_attn\.o_proj",
        "target_parameters": ["model.layers.2.self_attn.o_proj.weight", "layers.3.self_attn.o_proj.weight"],
        "alpha_pattern": {"o_proj": 20.0, r".*o_proj\.weight": 12.0}, "rank_pattern": {r".*2.*weight": 6, "o_proj": 3}},
    "rsLoRA": {"target_modules": ["q_proj"], "target_parameters": ["o_proj.weight"], "use_rslora": True,
               "alpha_pattern": {"o_proj.weight": 12.0}},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("case", CASES)
def test_scales_are_those_of_peft(tmp_path: Path, case: str) -> None:
    directory = save(tmp_path / "a", **CASES[case])
    theirs = peft.PeftModel.from_pretrained(make_model("llama"), directory).merge_and_unload()
    entry = read(directory)
    ours, base = merge(make_model("llama"), entry).state_dict(), make_model("llama").state_dict()
    changed = 0
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours[name], weight)
        changed += not torch.equal(base[name], weight)
    assert changed == len(entry.package.parts) >= 4


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_the_engine_answers_as_peft_does(tmp_path: Path) -> None:
    directory = save(tmp_path / "a", **CASES["both kinds of target"])
    theirs = peft.PeftModel.from_pretrained(make_model("llama"), directory)
    engine = Engine(make_model("llama", attention=PROBE))
    request = engine.add(prompts()[1], 10, register(engine, directory).ref)
    engine.run()
    assert request.tokens == reference(theirs, prompts()[1], 10)
    assert request.tokens != reference(make_model("llama"), prompts()[1], 10)


def edited(directory: Path, **config: Any) -> Path:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return directory


AMBIGUOUS = {"target_modules": ["o_proj"], "target_parameters": ["o_proj.weight"]}


@pytest.mark.parametrize("target", [["o_proj"], r".*\.o_proj", "all-linear"])
def test_a_linear_named_twice_with_two_meanings_is_refused(tmp_path: Path, target: Any) -> None:
    directory = save(tmp_path / "a", target_modules=["o_proj"])
    edited(directory, **AMBIGUOUS | {"target_modules": target}, alpha_pattern={"o_proj": 20})
    with pytest.raises(
        InvalidAdapter, match=r"layers.0.self_attn.o_proj is named by target_modules and.* either. Name it once$"
    ):
        read(directory)
    with pytest.raises(ValueError, match="not also targeted|also targeted with"):  # nor does PEFT load it
        peft.PeftModel.from_pretrained(make_model("llama"), edited(directory, target_modules=["o_proj"]))


def test_a_linear_named_twice_with_one_meaning_is_served(tmp_path: Path) -> None:
    directory = edited(save(tmp_path / "a", target_modules=["o_proj"]), **AMBIGUOUS, alpha_pattern={"q_proj": 20})
    assert len(read(directory).package.parts) == len(load_file(directory / "adapter_model.safetensors")) // 2


def test_a_listed_parameter_without_tensors_is_refused(tmp_path: Path) -> None:
    directory = edited(save(tmp_path / "a", target_modules=["o_proj"]), target_parameters=["q_proj.weight"])
    with pytest.raises(CoverageError, match="target_parameters lists q_proj.weight, but the file has no tensors"):
        read(directory)
