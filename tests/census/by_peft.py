"""Adapters that PEFT makes: every trainable parameter is moved by noise, then it is saved with PEFT's defaults."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.census.families import Family
from tests.census.made import Made, Maker, PeftCannot, peft_may_refuse

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _for_family(value: Any, family: Family) -> Any:
    """Rows give what differs by family as a function."""
    return value(family) if callable(value) and not isinstance(value, type) else value


def config(family: Family, **fields: Any) -> peft.LoraConfig:
    known = {key: _for_family(value, family) for key, value in fields.items()}
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    if not known.get("target_parameters"):
        defaults["target_modules"] = list(family.attention)
    return peft.LoraConfig(**{**defaults, **known})


@torch.no_grad()
def train(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            size = 0.15 if ".lora_A" in name or ".lora_B" in name else max(0.1, 0.3 * float(parameter.abs().mean()))
            parameter += torch.randn(parameter.shape, generator=generator) * size


def save(family: Family, directory: Path, saved: dict[str, Any] | None = None, **fields: Any) -> Path:
    """`saved` goes to save_pretrained. Raises PeftCannot."""
    with peft_may_refuse():
        torch.manual_seed(0)
        model = peft.get_peft_model(family.model(), config(family, **fields))
        train(model)
        model.save_pretrained(directory, **(saved or {}))
    return directory


def lora(saved: dict[str, Any] | None = None, **fields: Any) -> Maker:
    """A row of PEFT's own. Fields are LoraConfig's; a function is called with the family."""

    def make(family: Family, directory: Path) -> Made:
        return Made(save(family, directory, saved, **fields), directory)

    return make


def plain(family: Family, beside: Path) -> Path:
    """LoRA on attention, made once for each family: what the rows of formats rewrite."""
    directory = beside.parent / "plain"
    return directory if directory.exists() else save(family, directory)


def _origin(of: Maker | None, family: Family, directory: Path) -> Path:
    return of(family, directory.with_name(f"{directory.name}-origin")).path if of else plain(family, directory)


Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors, dict[str, Any], Family], Tensors | None]


def rewritten(change: Change, of: Maker | None = None) -> Maker:
    """The same adapter in another form: `change` edits tensors and configuration, or returns other tensors.

    What is right stays what PEFT makes of the directory before it was rewritten."""

    def make(family: Family, directory: Path) -> Made:
        origin = _origin(of, family, directory)
        tensors, written = load_file(origin / WEIGHTS), json.loads((origin / CONFIG).read_text())
        tensors = change(tensors, written, family) or tensors
        return Made(write(directory, tensors, written), origin)

    return make


def write(directory: Path, tensors: Tensors, written: dict[str, Any]) -> Path:
    directory.mkdir(parents=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(written))
    return directory


def configured(**fields: Any) -> Maker:
    """Keys of the configuration set to something else, where that changes nothing."""
    return rewritten(lambda _, written, __: written.update(fields))


def cast(dtype: torch.dtype, of: Maker | None = None) -> Maker:
    def make(family: Family, directory: Path) -> Made:
        origin = _origin(of, family, directory)
        tensors = {key: tensor.to(dtype) for key, tensor in load_file(origin / WEIGHTS).items()}
        return Made(write(directory, tensors, json.loads((origin / CONFIG).read_text())), directory)  # rounded is right

    return make


def reachable(family: Family) -> list[str]:
    """Names of linears that PEFT takes as such: on mixtures it takes those of an MLP for the experts' and the router's,
    but not on Qwen2-MoE, for which it has no such rule."""
    names = {
        name.rpartition(".")[2] for name, module in family.model().named_modules() if isinstance(module, nn.Linear)
    }
    has_rule = family.is_mixture and family.name != "qwen2_moe"
    return sorted(names - {"lm_head"} - (set(family.mlp) if has_rule else set()))


def load(base: nn.Module, directory: Path) -> nn.Module:
    """Raises PeftCannot, also where PEFT leaves parameters of the adapter as they were initialised."""
    import warnings

    with warnings.catch_warnings(record=True) as told, peft_may_refuse():
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, str(directory))
    missing = [str(warning.message) for warning in told if "missing adapter keys" in str(warning.message)]
    if missing:
        raise PeftCannot(missing[0][:160])
    return model.eval()
