"""Adapters for the tiny models: PEFT LoRA written by PEFT itself, ESFT in its own on-disk format."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapters_store.parts import ExpertReplacement, LowRank, Operand
from adapters_store.rules import Adapter, Rules
from tests.support.engine_harness import Engine

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def save_lora(directory: Path, model: nn.Module, seed: int, targets: Sequence[str], rank: int = 4, alpha: float = 8,
              **config: Any) -> Path:  # fmt: skip
    """`model` is left as it was."""
    import peft

    lora = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), task_type="CAUSAL_LM", **config)
    wrapped = peft.get_peft_model(model, lora)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(wrapped.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if ".lora_magnitude_vector" in name:  # the rows' own norms, from which training moves them
            parameter.data = parameter.data * (1 + 0.5 * noise.abs())
        elif ".lora_" in name:
            parameter.data = noise * 0.15
    wrapped.save_pretrained(directory, save_embedding_layers=False)
    wrapped.unload()
    return directory


def write_lora(directory: Path, model: nn.Module, seed: int, modules: re.Pattern[str], rank: int, alpha: float,
               dora: bool = False) -> Path:  # fmt: skip
    """The same format without PEFT, for linears that its target matching cannot reach."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and modules.fullmatch(name):
            tensors |= pair(name, rank, linear.in_features, linear.out_features, generator)
            if dora:
                noise = torch.randn(linear.out_features, generator=generator).abs()
                norms = linear.weight.data.norm(dim=1)
                tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = norms * (1 + 0.5 * noise)
    return write_adapter(directory, tensors, r=rank, lora_alpha=alpha, target_modules=modules.pattern, use_dora=dora)


def write_expert_lora(directory: Path, model: nn.Module, seed: int, rank: int, alpha: float) -> Path:
    """On routers and on both matrices of every routed expert, as PEFT's target_parameters are saved."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    module: Any
    for name, module in model.named_modules():
        if not name.endswith(".experts"):
            continue
        for matrix, key in (("gate_up_proj", f"{name}.base_layer"), ("down_proj", name)):
            count, *sides = getattr(module, matrix).shape
            inputs, outputs = sides if module.is_transposed else reversed(sides)
            tensors |= pair(key, count * rank, inputs, outputs, generator)
        block = name.rpartition(".")[0]
        router = next(leaf for leaf in ("gate", "router") if hasattr(model.get_submodule(block), leaf))
        experts, hidden = model.get_submodule(f"{block}.{router}").weight.shape
        tensors |= pair(f"{block}.{router}", rank, hidden, experts, generator)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", f"mlp.{router}.weight"]
    return write_adapter(directory, tensors, r=rank, lora_alpha=alpha, target_modules=[], target_parameters=targets,
                  peft_version="0.21.2")  # fmt: skip


PREFIX = "base_model.model."


def pair(module: str, rank: int, inputs: int, outputs: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, inputs, generator=generator) * 0.15,
        f"{PREFIX}{module}.lora_B.weight": torch.randn(outputs, rank, generator=generator) * 0.15,
    }


def write_adapter(directory: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return directory


def save_esft(directory: Path, model: nn.Module, seed: int, tuned: dict[int, list[int]], prefix: str = "model.",
              config: bool = True, shards: int = 1, shared: Sequence[int] = ()) -> Path:  # fmt: skip
    """Tuned experts are the base's plus noise of the same size: clearly another model. shared: layers whose shared
    experts are tuned as well."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer, experts in tuned.items():
        module = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        for expert in experts:
            gate, up = module.gate_up_proj.data[expert].chunk(2)
            for matrix, weight in (("gate", gate), ("up", up), ("down", module.down_proj.data[expert])):
                key = f"{prefix}layers.{layer}.mlp.experts.{expert}.{matrix}_proj.weight"
                tensors[key] = weight + torch.randn(weight.shape, generator=generator) * weight.std()
    for layer in shared:
        for matrix in ("gate", "up", "down"):
            key = f"layers.{layer}.mlp.shared_experts.{matrix}_proj"
            weight = rows_of(model, f"model.{key}")
            noise = torch.randn(weight.shape, generator=generator) * weight.std()
            tensors[f"{prefix}{key}.weight"] = weight + noise
    return write_esft(directory, tensors, tuned, config, shards, bool(shared))


def write_esft(directory: Path, tensors: Mapping[str, Tensor], tuned: dict[int, list[int]], config: bool = True,
               shards: int = 1, has_shared: bool = False) -> Path:  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:06}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[shard::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if config:
        expert_cfg = {"experts": {str(layer): experts for layer, experts in tuned.items()},
                      "shared_experts": has_shared, "non_expert_modules": False}  # fmt: skip
        (directory / "expert_cfg.json").write_text(json.dumps(expert_cfg))
    return directory


def register(engine: Engine, path: Path, name: str | None = None) -> Adapter:
    """Through the same door as a server's: verified against the base's shapes, then made known to the engine."""
    rules = Rules(engine.assembly.info.base, (path.parent,))
    entry = rules.read(name or path.name, str(path))
    engine.register(entry.ref, entry.package)
    return entry


@torch.no_grad()
def merge(model: nn.Module, entry: Adapter) -> nn.Module:
    """The oracle: the adapter's weights merged into a plain Transformers model, in place."""
    files = {file.file: load_file(file.path) for file in entry.package.files}
    for part in entry.package.parts:
        match part:
            case LowRank():
                delta = part.scale * dense(part.b, files) @ dense(part.a, files)
                views = _views_of(model, part.module)
                for rows, change in zip(views, delta.split([it.shape[-2] for it in views], dim=-2), strict=True):
                    rows += change
                if part.magnitude is not None:
                    (rows,) = views
                    rows *= (dense(part.magnitude, files) / rows.norm(dim=1))[:, None]
            case ExpertReplacement():
                experts = _experts_of(model, part.layer)
                tuned = zip(("gate_proj", "up_proj", "down_proj"), (*part.gate_up, part.down), strict=True)
                for matrix, tensor in tuned:
                    rows, stored = rows_of(model, f"{experts}.{matrix}"), files[tensor.file][tensor.key]
                    if part.expert < len(rows):
                        rows[part.expert] = stored
                    else:  # a block of the layer, which the file has as it is
                        rows_of(model, f"{experts.removesuffix('experts')}shared_experts.{matrix}").copy_(stored)
            case _:
                raise TypeError(f"the oracle does not know {type(part).__name__}")
    return model


def _experts_of(model: nn.Module, layer: int) -> str:
    found = re.compile(rf"(?:.*\.)?(?:layers|blocks)\.{layer}\.(?:\w+\.)?experts")
    (name,) = (name for name, _ in model.named_modules() if found.fullmatch(name))
    return name


def dense(operand: Operand, files: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """An operand out of its files, in float32."""
    out = torch.zeros(operand.shape)
    for piece in operand.pieces:
        it = piece.tensor
        stored = files[it.file][it.key].float().flatten()
        if it.cut_from is not None:
            stored = stored.view(it.cut_from.shape)
            stored = stored.permute(it.cut_from.order or tuple(range(stored.dim())))
            stored = stored[_from(it.cut_from.start, it.shape)]
        out[_from(piece.start, it.shape)] = piece.factor * stored.reshape(it.shape)
    return out


def rows_of(model: nn.Module, module: str) -> Tensor:
    """[out, in] of a linear, or [M, out, in] of a matrix of routed experts: a view of the model's own."""
    (rows,) = _views_of(model, module)
    return rows


def _views_of(model: nn.Module, module: str) -> list[Tensor]:
    """The same in the parts that the model has it in, one below the other."""
    experts, _, matrix = module.rpartition(".")
    if not experts.endswith(".experts"):
        linear: Any = model.get_submodule(module)
        return [linear.weight.data.T if isinstance(linear, Conv1D) else linear.weight.data]
    held: Any = model.get_submodule(experts)
    if hasattr(held, "mlp"):  # DBRX's
        flat = (held.mlp.w1, held.mlp.v1, held.mlp.w2)
        gate, up, down = (it.data.unflatten(0, (held.num_experts, -1)) for it in flat)
        parts = {"gate_proj": [gate], "up_proj": [up], "down_proj": [down.transpose(1, 2)]}
        return parts.get(matrix, [gate, up])
    gate_up, down = held.gate_up_proj.data, held.down_proj.data
    if gate_up.shape[1] == down.shape[2]:  # both are [M, in, out]
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if matrix in ("gate_proj", "up_proj"):
        return [gate_up.chunk(2, dim=1)[matrix == "up_proj"]]
    return [gate_up if matrix == "gate_up_proj" else down]


def _from(start: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(at, at + size) for at, size in zip(start, shape, strict=True))
