"""Adapters as files, sound and hostile, for a base that is a list of shapes: no model, no PEFT."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adapters_store.base_spec import BaseSpec, ExpertStack
from adapters_store.files import Folder
from adapters_store.formats import read_adapter as read_folder
from adapters_store.parts import AdapterPackage, Assembled, LowRank, Operand, TensorRef, Whole

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


def read_adapter(directory: Path, base: BaseSpec, ignore_keys: Sequence[str] = ()) -> AdapterPackage:
    with Folder(str(directory), (os.path.realpath(directory.parent),)) as folder:
        return read_folder(folder, base, ignore_keys=ignore_keys)[0]


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


def operand(package: AdapterPackage, operand: Operand) -> torch.Tensor:
    """What a part's operand says, made from the files' bytes: float64."""
    if isinstance(operand, Assembled):
        found = torch.zeros(operand.shape, dtype=torch.float64)
        filled = torch.zeros(operand.shape, dtype=torch.bool)
        for piece in operand.pieces:
            place = tuple(
                slice(start, start + size) for start, size in zip(piece.start, piece.tensor.shape, strict=True)
            )
            assert found[place].shape == piece.tensor.shape and not filled[place].any()
            found[place], filled[place] = piece.factor * _tensor(package, piece.tensor), True
        return found
    return _tensor(package, operand)


def _tensor(package: AdapterPackage, tensor: TensorRef) -> torch.Tensor:
    whole = tensor.cut_from or Whole(tensor.shape, (0,) * len(tensor.shape))
    raw = Path(next(it.path for it in package.files if it.file == tensor.file)).read_bytes()
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.dtype]
    stored = torch.frombuffer(bytearray(raw), dtype=dtype, count=tensor.stored_elements, offset=tensor.offset)
    seen = stored.view(whole.shape).permute(whole.order or tuple(range(len(whole.shape))))
    cut = seen[tuple(slice(start, start + size) for start, size in zip(whole.start, tensor.shape, strict=True))]
    assert cut.shape == tensor.shape
    return cut.double()


def delta(package: AdapterPackage, module: str) -> torch.Tensor:
    """[out, in], or [M or 1, out, in] of routed experts: what the LoRA of this module adds to the weights."""
    part = next(part for part in package.parts if isinstance(part, LowRank) and part.module == module)
    return part.scale * operand(package, part.b) @ operand(package, part.a)


def save_peft(directory: Path, tensors: dict[str, torch.Tensor], rank: int = 2, **config: Any) -> Path:
    """`tensors` by key without PEFT's prefix."""
    directory.mkdir(exist_ok=True)
    keyed = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()}
    save_file(keyed, directory / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": "x"}
    (directory / "adapter_config.json").write_text(json.dumps(written | config))
    return directory
