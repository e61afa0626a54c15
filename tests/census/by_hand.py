"""Adapters written key by key, and what each adds to the base's parameters, without PEFT and without Heddle."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.census.by_peft import Tensors, write
from tests.census.families import Family, expert_modules, parents
from tests.census.made import Deltas, Made

MATRICES = ("gate", "up", "down")
PEFT = "base_model.model."
SIZE = 0.15


class Noise:
    def __init__(self, seed: int = 1) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator) * SIZE


def config(**fields: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, **fields}


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer: [E, out, in] with gate before up, or [E, in, out] with gate and up in turns."""

    module: str
    count: int
    hidden: int
    inner: int
    transposed: bool

    def shape(self, matrix: str) -> tuple[int, int]:
        """(out, in) of one expert's."""
        return (self.hidden, self.inner) if matrix == "down" else (self.inner, self.hidden)

    def weight(self, model: nn.Module, matrix: str, expert: int) -> Tensor:
        """[out, in] of one expert's, as it is in the base."""
        return self._part(getattr(model.get_submodule(self.module), self._name(matrix)).detach()[expert], matrix)

    def place(self, deltas: Deltas, matrix: str, expert: int, delta: Tensor) -> None:
        """Add [out, in] to one expert's matrix."""
        outs, ins = self.shape(matrix)
        outs *= 1 if matrix == "down" else 2
        shape = (self.count, ins, outs) if self.transposed else (self.count, outs, ins)
        whole = deltas.setdefault(f"{self.module}.{self._name(matrix)}", torch.zeros(shape))
        self._part(whole[expert], matrix).add_(delta)

    def _name(self, matrix: str) -> str:
        return "down_proj" if matrix == "down" else "gate_up_proj"

    def _part(self, stored: Tensor, matrix: str) -> Tensor:
        """A view, as [out, in]."""
        whole = stored.T if self.transposed else stored
        if matrix == "down":
            return whole
        if self.transposed:
            return whole[MATRICES.index(matrix) :: 2]
        return whole[: self.inner] if matrix == "gate" else whole[self.inner :]


def experts_of(model: nn.Module, family: Family) -> dict[int, Experts]:
    """By layer."""
    found = {}
    for layer, module in expert_modules(model).items():
        count, first, second = model.get_submodule(module).down_proj.shape
        hidden, inner = (second, first) if family.is_transposed else (first, second)
        found[layer] = Experts(module, count, hidden, inner, family.is_transposed)
    return found


def scale(rank: int, alpha: float = 8, rslora: bool = False) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def add_linear(tensors: Tensors, deltas: Deltas, model: nn.Module, module: str, noise: Noise, rank: int = 4,
               key: str | None = None, times: float | None = None) -> None:  # fmt: skip
    """LoRA on a parameter `module`.weight, under the key `key` if that is not the module's name."""
    outs, ins = model.get_submodule(module).weight.shape
    a, b = noise(rank, ins), noise(outs, rank)
    tensors[f"{PEFT}{key or module}.lora_A.weight"], tensors[f"{PEFT}{key or module}.lora_B.weight"] = a, b
    deltas[f"{module}.weight"] = (scale(rank) if times is None else times) * b @ a


def add_attention(tensors: Tensors, deltas: Deltas, model: nn.Module, family: Family, noise: Noise) -> None:
    for parent in parents(model, family.attention[0]):
        for name in family.attention:
            add_linear(tensors, deltas, model, f"{parent}.{name}", noise)


def write_lora(directory: Path, tensors: Tensors, deltas: Deltas, **fields: Any) -> Made:
    return Made(write(directory, tensors, config(**fields)), deltas)


def write_files(directory: Path, files: dict[str, Tensors | dict[str, Any] | bytes]) -> Path:
    """Safetensors, JSON or bytes, by name."""
    directory.mkdir(parents=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (directory / name).write_bytes(content)
        elif name.endswith(".json"):
            (directory / name).write_text(json.dumps(content))
        else:
            save_file({key: tensor.contiguous() for key, tensor in content.items()}, directory / name)
    return directory
