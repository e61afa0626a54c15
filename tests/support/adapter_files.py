"""Adapters as files, sound and hostile, for a base that is a list of shapes: no model, no PEFT."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.files import Folder
from adapters_store.formats import read_adapter as read_folder
from adapters_store.parts import AdapterPackage

HIDDEN, FFN, LAYERS, EXPERTS = 8, 6, 3, 4
LINEARS = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(LAYERS)
    for name, shape in {"self_attn.q_proj": (HIDDEN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN)}.items()
}
STACKS = {layer: ExpertStack(EXPERTS, HIDDEN, FFN, f"model.layers.{layer}.mlp.experts") for layer in (1, 2)}
BASE = BaseSpec("tiny", LINEARS, STACKS)
DENSE = BaseSpec("dense", LINEARS, {})
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def lora(directory: Path, rank: int = 2, modules: Any = ("self_attn.q_proj", "mlp.up_proj"), **config: Any) -> Path:
    tensors = {}
    for layer in range(LAYERS):
        for name in modules:
            module = f"model.layers.{layer}.{name}"
            out_features, in_features = LINEARS[module]
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, in_features)
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(out_features, rank)
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": [m.split(".")[1] for m in modules]}
    (directory / "adapter_config.json").write_text(json.dumps(written | config))
    return directory


def esft(directory: Path, tuned: dict[int, list[int]], prefix: str = "model.", **config: Any) -> Path:
    tensors = {}
    for layer, ids in tuned.items():
        for expert in ids:
            for matrix, shape in (("gate", (FFN, HIDDEN)), ("up", (FFN, HIDDEN)), ("down", (HIDDEN, FFN))):
                tensors[f"{prefix}layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight"] = torch.randn(shape)
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "model-00001-of-000001.safetensors")
    written = {"experts": {str(layer): ids for layer, ids in tuned.items()}, "shared_experts": False,
               "non_expert_modules": False}  # fmt: skip
    (directory / "expert_cfg.json").write_text(json.dumps(written | config))
    return directory


def read_adapter(directory: Path, base: BaseSpec) -> AdapterPackage:
    with Folder(str(directory), (os.path.realpath(directory.parent),)) as folder:
        return read_folder(folder, base)


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return directory


# deeper than Python's parser goes for a recursive reader, and no error of JSON
NESTED_CONFIG = '{"peft_type": "LORA", "r": 1, "lora_alpha": 1, "rank_pattern": ' + '{"a":' * 900 + "1" + "}" * 901


def slow_patterns(value: int = 2) -> dict[str, int]:
    """They take minutes: each is below the limit on one match, but there are two thousand of them."""
    return {rf"(.|..|...){{1,10}}(?<=!)(?#{number})": value for number in range(1999)}
