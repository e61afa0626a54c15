"""LoRA on routed experts and routers in the forms that were written before PEFT 0.19 and that others write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.census import by_hand
from tests.census.by_hand import MATRICES, PEFT, Noise, scale
from tests.census.by_peft import Tensors
from tests.census.families import Family, expert_modules, parents
from tests.census.made import Deltas, Made, Maker

TINKER = {"gate": "w1", "up": "w3", "down": "w2"}


def always(expert: int) -> bool:
    return True


def per_expert(
    matrices: tuple[str, ...] = MATRICES,
    which: Callable[[int], bool] = always,
    rank_of: Callable[[int, str], int] = lambda expert, matrix: 4,
    alpha_of: Callable[[str], float] = lambda matrix: 8,
    attention: bool = False,
    other_mlps: bool = False,
    fields: Callable[[Family], dict[str, Any]] = lambda family: {},
) -> Maker:
    """Transformers 4's names: an nn.Linear for each matrix of each expert. `fields` go into the configuration.

    `other_mlps`: shared experts and dense layers too, as the bare names of an MLP meant there."""

    def make(family: Family, directory: Path) -> Made:
        tensors: Tensors = {}
        deltas: Deltas = {}
        names = "|".join([*(family.attention if attention else ()), *_of_experts(names_of(family, matrices))])
        written: dict[str, Any] = {"target_modules": rf".*\.({names})", **fields(family)}
        if other_mlps:
            written["target_modules"] = names_of(family, matrices)
        noise, model = Noise(), family.model()
        for layer, experts in by_hand.experts_of(model, family).items():
            for expert in filter(which, range(experts.count)):
                for matrix, name in zip(matrices, names_of(family, matrices), strict=True):
                    rank, (outs, ins) = rank_of(expert, matrix), experts.shape(matrix)
                    a, b = noise(rank, ins), noise(outs, rank)
                    key = f"{PEFT}model.layers.{layer}.{family.v4_block}.experts.{expert}.{name}"
                    tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
                    times = scale(rank, alpha_of(matrix), bool(written.get("use_rslora")))
                    experts.place(deltas, matrix, expert, times * b @ a)
        if attention:
            by_hand.add_attention(tensors, deltas, model, family, noise)
        if other_mlps:
            _add_other_mlps(tensors, deltas, model, noise, names_of(family, matrices))
        return by_hand.write_lora(directory, tensors, deltas, **written)

    return make


def _of_experts(names: list[str]) -> list[str]:
    return [rf"experts\.\d+\.{name}" for name in names]


def _add_other_mlps(tensors: Tensors, deltas: Deltas, model: nn.Module, noise: Noise, names: list[str]) -> None:
    for module, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and ".mlp." in module and module.rpartition(".")[2] in names:
            by_hand.add_linear(tensors, deltas, model, module, noise)


def names_of(family: Family, matrices: tuple[str, ...]) -> list[str]:
    """What Transformers 4 called these matrices of an expert."""
    return [family.mlp[MATRICES.index(matrix)] for matrix in matrices]


def swapped(parameters: tuple[str, ...], peft_version: str | None = None, inner: int | None = None) -> Maker:
    """PEFT 0.17 and 0.18: for a parameter [E, one, other], A is [E*r, one] and B is [other, r*E].

    `inner`: serve a base whose experts are of this size."""

    def make(family: Family, directory: Path) -> Made:
        tensors: Tensors = {}
        deltas: Deltas = {}
        noise, rank, base = Noise(), 4, _narrow(family, inner)
        model = base("eager")
        for module in expert_modules(model).values():
            stored = model.get_submodule(module)
            for name in parameters:
                count, one, other = getattr(stored, name).shape
                a, b = noise(count * rank, one), noise(other, rank * count)
                # the first parameter of a module is wrapped first, so it is what the second one's wrapper holds
                key = f"{PEFT}{module}{'.base_layer' if len(parameters) == 2 and name == 'gate_up_proj' else ''}"
                tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
                by_expert = a.view(count, rank, one), b.view(other, rank, count)
                deltas[f"{module}.{name}"] = scale(rank) * torch.einsum("erx,yre->exy", *by_expert)
        fields: dict[str, Any] = {"target_modules": [], "target_parameters": [f"mlp.experts.{it}" for it in parameters]}
        if peft_version is not None:
            fields["peft_version"] = peft_version
        made = by_hand.write_lora(directory, tensors, deltas, **fields)
        return made if inner is None else Made(made.path, made.truth, base=base)

    return make


def _narrow(family: Family, inner: int | None) -> Callable[[str], nn.Module]:
    """The family's base, with experts of another size: two times 32 by 64 is square."""
    if inner is None:
        return family.model
    key = "intermediate_size" if family.name in ("mixtral", "olmoe") else "moe_intermediate_size"
    return lambda attention: family.model(attention, **{key: inner})


def narrow(family: Family, directory: Path) -> Made:
    """As today's PEFT writes it for the square parameter."""
    import peft

    from tests.census import by_peft
    from tests.census.made import peft_may_refuse

    base = _narrow(family, 32)
    with peft_may_refuse():
        torch.manual_seed(0)
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = peft.get_peft_model(base("eager"), by_peft.config(family, target_parameters=parameters))
        by_peft.train(model)
        model.save_pretrained(directory)
    return Made(directory, directory, base=base)


def stacked(shared: dict[str, str], attention: bool = False, **fields: Any) -> Maker:
    """3-D tensors w1, w3, w2: A is [E, r, in], B is [E, out, r]; `shared` names the sides of each that are [1, …]."""

    def make(family: Family, directory: Path) -> Made:
        tensors: Tensors = {}
        deltas: Deltas = {}
        noise, model, rank = Noise(), family.model(), 4
        for layer, experts in by_hand.experts_of(model, family).items():
            for matrix in shared:
                outs, ins = experts.shape(matrix)
                a = noise(1 if "A" in shared[matrix] else experts.count, rank, ins)
                b = noise(1 if "B" in shared[matrix] else experts.count, outs, rank)
                key = f"{PEFT}model.layers.{layer}.mlp.experts.{TINKER[matrix]}"
                tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
                delta = scale(rank) * torch.einsum("eor,eri->eoi", b.expand(experts.count, -1, -1),
                                                   a.expand(experts.count, -1, -1))  # fmt: skip
                for expert in range(experts.count):
                    experts.place(deltas, matrix, expert, delta[expert])
        if attention:
            by_hand.add_attention(tensors, deltas, model, family, noise)
        names = [*(TINKER[matrix] for matrix in shared), *(family.attention if attention else ())]
        return by_hand.write_lora(directory, tensors, deltas, **{"target_modules": names, **fields})

    return make


def v4_router(attention: bool = False, rslora: bool = False, everything: bool = False) -> Maker:
    """Transformers 4's names, by which a router was an nn.Linear; `everything`: and all the other linears too."""

    def make(family: Family, directory: Path) -> Made:
        tensors: Tensors = {}
        deltas: Deltas = {}
        if everything:
            whole = per_expert(attention=True)(family, directory.with_name(f"{directory.name}-experts"))
            tensors, deltas = _read(whole)
        noise, model = Noise(2), family.model()
        for parent in parents(model, str(family.router)):
            if hasattr(model.get_submodule(f"{parent}.{family.router}"), "weight"):
                key = f"{parent.rpartition('.')[0]}.{family.v4_block}.{family.router}"
                module = f"{parent}.{family.router}"
                by_hand.add_linear(tensors, deltas, model, module, noise, key=key, times=scale(4, 8, rslora))
        if everything:
            _add_other_mlps(tensors, deltas, model, noise, [*family.mlp, "shared_expert_gate"])
        elif attention:
            by_hand.add_attention(tensors, deltas, model, family, noise)
        targets = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in tensors})
        return by_hand.write_lora(directory, tensors, deltas, target_modules=targets, use_rslora=rslora)

    return make


def _read(made: Made) -> tuple[Tensors, Deltas]:
    from safetensors.torch import load_file

    assert isinstance(made.truth, dict)
    return load_file(made.path / "adapter_model.safetensors"), dict(made.truth)
