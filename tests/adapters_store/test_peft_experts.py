"""Routed experts as PEFT itself writes them, on tiny mixtures; PEFT's own change of the weights is the judge."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.parts import AdapterPackage, LowRank
from tests.support.adapter_files import delta, read_adapter
from tests.support.tiny_models import make_model

TRANSPOSED = ("gpt_oss",)


def spec(model: nn.Module) -> BaseSpec:
    """The base as its shapes say, without the server's model."""
    linears, experts, biased = {}, {}, set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        is_router = name.endswith((".gate", ".router"))
        if isinstance(module, nn.Linear) or (is_router and isinstance(weight, nn.Parameter)):
            linears[name] = tuple(weight.shape)  # type: ignore[union-attr]
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            biased.add(name)
        down = getattr(module, "down_proj", None)
        if name.endswith(".experts") and isinstance(down, nn.Parameter):
            is_transposed = model.config.model_type in TRANSPOSED
            count, *shape = down.shape
            hidden, inner = reversed(shape) if is_transposed else shape
            stack = ExpertStack(count, hidden, inner, name, is_transposed, is_transposed, is_transposed)
            experts[int(name.split(".")[2])] = stack
    return BaseSpec(model.config.model_type, linears, experts, frozenset(biased))  # type: ignore[arg-type]


def trained(model: nn.Module, directory: Path, **config: Any) -> peft.PeftModel:
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(wrapped.named_parameters()):
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
            if "magnitude" in name:
                parameter.data += 1
    wrapped.save_pretrained(directory, save_embedding_layers=False)
    return wrapped


def changes(wrapped: peft.PeftModel) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight, by the name of the part."""
    found = {}
    for name, module in wrapped.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.layer.ParamWrapper):
            plain = name.replace(".base_layer", "")
            is_experts = plain.endswith(".experts")
            found[f"{plain}.{module.parameter_name}" if is_experts else plain] = module.get_delta_weight("default")
        elif isinstance(module, peft.tuners.lora.layer.Linear):
            found[name] = module.get_delta_weight("default")
    return found


def assert_equal(package: AdapterPackage, theirs: dict[str, torch.Tensor], is_transposed: bool) -> None:
    assert {part.module for part in package.parts if isinstance(part, LowRank)} == set(theirs)
    for name, change in theirs.items():
        expected = change.mT if is_transposed and change.dim() == 3 else change
        torch.testing.assert_close(delta(package, name).float(), expected.detach(), rtol=1e-4, atol=1e-5)


CASES: dict[str, dict[str, Any]] = {
    "both matrices": {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "gate_up alone": {"target_parameters": ["experts.gate_up_proj"]},
    "down alone": {"target_parameters": ["down_proj"]},
    "with attention": {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["gate_up_proj", "down_proj"]},
    "patterns": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "use_rslora": True,
                 "rank_pattern": {r".*\.gate_up_proj": 5, "experts": 2},
                 "alpha_pattern": {"layers.1.mlp.experts.down_proj": 9}},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("family", ["olmoe", "mixtral-window", "deepseek_v2", "gpt_oss"])
@pytest.mark.parametrize("case", CASES)
def test_parameters_of_experts(tmp_path: Path, family: str, case: str) -> None:
    base = spec(make_model(family))
    config = {"target_modules": [], **CASES[case]}
    wrapped = trained(make_model(family), tmp_path / "a", **config)
    assert_equal(read_adapter(tmp_path / "a", base), changes(wrapped), family in TRANSPOSED)


@pytest.mark.parametrize(("family", "router"), [("olmoe", "gate"), ("mixtral-window", "gate"), ("gpt_oss", "router")])
def test_routers(tmp_path: Path, family: str, router: str) -> None:
    base = spec(make_model(family))
    wrapped = trained(make_model(family), tmp_path / "a", target_modules=[], target_parameters=[f"{router}.weight"])
    theirs = changes(wrapped)
    assert len(theirs) == 4
    assert_equal(read_adapter(tmp_path / "a", base), theirs, is_transposed=False)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("family", ["olmoe", "mixtral-window", "qwen3_moe", "deepseek_v2"])
def test_all_linear(tmp_path: Path, family: str) -> None:
    """PEFT then turns the names of Transformers 4 into parameters, and doubles the rank of gate and up."""
    base = spec(make_model(family))
    wrapped = trained(make_model(family), tmp_path / "a", target_modules="all-linear")
    theirs = changes(wrapped)
    assert any(name.endswith("gate_up_proj") for name in theirs)
    assert_equal(read_adapter(tmp_path / "a", base), theirs, is_transposed=False)


@pytest.mark.parametrize("hidden", [48, 96])  # down_proj, or gate_up_proj, is square
def test_a_square_matrix(tmp_path: Path, hidden: int) -> None:
    sizes = {"hidden_size": hidden, "intermediate_size": 48}
    base = spec(make_model("olmoe", **sizes))
    name = "down_proj" if hidden == 48 else "gate_up_proj"
    config = {"target_modules": [], "target_parameters": [f"experts.{name}"]}
    wrapped = trained(make_model("olmoe", **sizes), tmp_path / "a", **config)
    assert_equal(read_adapter(tmp_path / "a", base), changes(wrapped), is_transposed=False)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_magnitudes(tmp_path: Path, use_rslora: bool) -> None:
    base = spec(make_model("qwen2"))
    config = {"target_modules": ["q_proj", "down_proj", "lm_head"], "use_dora": True, "rank_pattern": {"q_proj": 5}}
    wrapped = trained(make_model("qwen2"), tmp_path / "a", use_rslora=use_rslora, **config)
    package = read_adapter(tmp_path / "a", base)
    assert_equal(package, changes(wrapped), is_transposed=False)
    assert all(part.magnitude is not None for part in package.parts if isinstance(part, LowRank))


@pytest.mark.parametrize(("family", "bias", "is_served"), [("llama", "all", True), ("llama", "lora_only", True),
                                                           ("qwen2", "lora_only", False)])  # fmt: skip
def test_biases(tmp_path: Path, family: str, bias: str, is_served: bool) -> None:
    base = spec(make_model(family))
    trained(make_model(family), tmp_path / "a", target_modules=["q_proj"], bias=bias)
    if is_served:
        assert len(read_adapter(tmp_path / "a", base).parts) == 4
    else:
        with pytest.raises(Exception, match="train with bias='none'"):
            read_adapter(tmp_path / "a", base)
