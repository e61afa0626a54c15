"""Adapters on everything that a base takes them on, written from what the engine says of the base."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters_store.base_spec import BaseSpec, ExpertStack
from tests.support.tiny_adapters import pair, rows_of, write_adapter, write_esft

_TUNED = (5, 0, 3)  # experts of a layer, as far as there are so many


def lora_everywhere(directory: Path, base: BaseSpec, model: nn.Module, rank: int = 3, alpha: float = 4) -> Path:
    """On every linear that the base says it has, but on routers, whose choices would hide the rest."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for name, (outputs, inputs) in base.linears.items():
        if name not in routers(base):
            tensors |= pair(name, rank, inputs, outputs, generator)
    return write_adapter(directory, tensors, r=rank, lora_alpha=alpha, target_modules="all")


def expert_lora(directory: Path, base: BaseSpec, rank: int = 3, alpha: float = 5) -> Path:
    """On both matrices of every routed expert, and on the routers that take it; as PEFT's target_parameters."""
    generator = torch.Generator().manual_seed(2)
    tensors: dict[str, Tensor] = {}
    for stack in base.experts.values():
        for matrix, key in (("gate_up_proj", f"{stack.name}.base_layer"), ("down_proj", stack.name)):
            outputs, inputs = stack.matrices[f"{stack.name}.{matrix}"]
            tensors |= pair(key, stack.num_experts * rank, inputs, outputs, generator)
    for name in routers(base):
        outputs, inputs = base.linears[name]
        tensors |= pair(name, rank, inputs, outputs, generator)
    targets = sorted({f"{'.'.join(stack.name.split('.')[3:])}.{matrix}" for stack in base.experts.values()
                      for matrix in ("gate_up_proj", "down_proj")})  # fmt: skip
    return write_adapter(directory, tensors, r=rank, lora_alpha=alpha, target_modules=[],
                         target_parameters=targets, peft_version="0.21.2")  # fmt: skip


def tuned_experts(directory: Path, base: BaseSpec, model: nn.Module) -> Path:
    """Some experts of every layer, moved by noise of their own size."""
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, Tensor] = {}
    for layer, stack in base.experts.items():
        for expert in _tuned(stack):
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                rows = rows_of(model, f"{stack.name}.{matrix}")[expert]
                noise = torch.randn(rows.shape, generator=generator) * rows.std()
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight"] = rows + noise
    return write_esft(directory, tensors, {layer: _tuned(stack) for layer, stack in base.experts.items()})


def _tuned(stack: ExpertStack) -> list[int]:
    return [expert for expert in _TUNED if expert < stack.num_experts]


def routers(base: BaseSpec) -> list[str]:
    return [name for stack in base.experts.values() if (name := _router_of(base, stack)) is not None]


def _router_of(base: BaseSpec, stack: ExpertStack) -> str | None:
    """The linear beside a layer's experts that scores them."""
    block = stack.name.rpartition(".")[0]
    found: list[Any] = [name for name, shape in base.linears.items()
                        if name.startswith(f"{block}.") and shape == (stack.num_experts, stack.hidden_size)
                        and "shared" not in name and "attn" not in name]  # fmt: skip
    return found[0] if found else None
