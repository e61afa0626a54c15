"""LoRA on routed experts, and on routers."""

from typing import Any

import torch

from tests.census.by_peft import cast, lora
from tests.census.expert_makers import names_of, narrow, per_expert, stacked, swapped, v4_router
from tests.census.families import GATED, MIXTURES, Family
from tests.census.lora_rows import attention, attention_and_mlp, mlp, router
from tests.census.made import Row, Section

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
BOTH = [GATE_UP, DOWN]


def weight_of_router(family: Family) -> list[str]:
    return [f"mlp.{family.router}.weight"]


def experts_and_router(family: Family) -> list[str]:
    return [*BOTH, *weight_of_router(family)]


def _rank_by_expert(family: Family) -> dict[str, Any]:
    return {"rank_pattern": {f"experts.3.{name}": 2 for name in family.mlp}}


def _of_down(key: str, value: float) -> Any:
    return lambda family: {key: {names_of(family, ("down",))[0]: value}}


def _both_of_down_and_rslora(family: Family) -> dict[str, Any]:
    return {**_of_down("rank_pattern", 2)(family), **_of_down("alpha_pattern", 24)(family), "use_rslora": True}


_BY_PEFT = [
    Row("target_parameters experts", lora(target_parameters=BOTH, target_modules=[]), MIXTURES),
    Row("target_parameters experts, target_modules null", lora(target_parameters=BOTH), MIXTURES),
    Row("target_parameters experts gate_up only", lora(target_parameters=[GATE_UP], target_modules=[]), MIXTURES),
    Row("target_parameters experts down only", lora(target_parameters=[DOWN], target_modules=[]), MIXTURES),
    Row("attention + target_parameters experts", lora(target_parameters=BOTH, target_modules=attention), MIXTURES),
    Row("target_parameters experts + rslora",
        lora(target_parameters=BOTH, target_modules=[], use_rslora=True), MIXTURES),
    Row("target_parameters experts + rank_pattern by parameter name",
        lora(target_parameters=BOTH, target_modules=[], rank_pattern={"experts.down_proj": 2}), MIXTURES),
    Row("target_parameters experts + alpha_pattern by parameter name",
        lora(target_parameters=BOTH, target_modules=[], alpha_pattern={"experts.gate_up_proj": 24}), MIXTURES),
    Row("target_parameters experts + rank + alpha pattern + rslora",
        lora(target_parameters=BOTH, target_modules=[], rank_pattern={"gate_up_proj": 6},
             alpha_pattern={r"layers\.2\.mlp\.experts\.down_proj": 24}, use_rslora=True), MIXTURES),
    Row("target_parameters experts, alpha_pattern that names the module",
        lora(target_parameters=BOTH, target_modules=[], alpha_pattern={"mlp.experts": 24}), MIXTURES),
    Row("target_parameters experts of one layer",
        lora(target_parameters=[f"layers.2.{it}" for it in BOTH], target_modules=[]), MIXTURES),
    Row("target_parameters experts, saved in bfloat16",
        cast(torch.bfloat16, lora(target_parameters=BOTH, target_modules=[])), MIXTURES),
    Row("target_parameters experts + router", lora(target_parameters=experts_and_router, target_modules=[]), MIXTURES),
    Row("mlp names, rslora", lora(target_modules=mlp, use_rslora=True), MIXTURES),
    Row("mlp names, alpha_pattern", lora(target_modules=mlp, alpha_pattern={"down_proj": 24}), MIXTURES),
    Row("attention + mlp names, rank_pattern on attention",
        lora(target_modules=attention_and_mlp, rank_pattern={"o_proj": 2}), MIXTURES),
    Row("all-linear, rslora", lora(target_modules="all-linear", use_rslora=True), MIXTURES),
]  # fmt: skip
_SWAPPED = [
    Row("PEFT 0.18 layout, both", swapped(("gate_up_proj", "down_proj"), "0.18.1"), GATED),
    Row("PEFT 0.18 layout, gate_up only", swapped(("gate_up_proj",), "0.18.0"), GATED),
    Row("PEFT 0.18 layout, down only", swapped(("down_proj",), "0.18.0"), GATED),
    Row("PEFT 0.17 layout (no peft_version), both", swapped(("gate_up_proj", "down_proj")), GATED),
    Row("PEFT 0.17 layout (no peft_version), gate_up only", swapped(("gate_up_proj",)), GATED),
    Row("PEFT 0.17 layout (no peft_version), down only", swapped(("down_proj",)), GATED),
    Row("square gate_up, as PEFT writes it now", narrow, GATED),
    Row("square gate_up, PEFT 0.18 layout, both", swapped(("gate_up_proj", "down_proj"), "0.18.1", 32), GATED),
    Row("square gate_up, PEFT 0.18 layout, gate_up only", swapped(("gate_up_proj",), "0.18.1", 32), GATED),
    Row("square gate_up, PEFT 0.17 layout (no peft_version), both",
        swapped(("gate_up_proj", "down_proj"), None, 32), GATED),
    Row("square gate_up, PEFT 0.17 layout (no peft_version), gate_up only",
        swapped(("gate_up_proj",), None, 32), GATED),
]  # fmt: skip
# what is right is what Transformers 4 trained; today's PEFT loads some of these otherwise, or not at all
_V4 = [
    Row("v4 keys, gate, up and down", per_expert(), GATED),
    Row("v4 keys, mlp names: shared experts and dense layers too", per_expert(other_mlps=True), GATED),
    Row("v4 keys with attention", per_expert(attention=True), GATED),
    Row("v4 keys, lora_dropout 0.05", per_expert(fields=lambda _: {"lora_dropout": 0.05}), GATED),
    Row("v4 keys, down only", per_expert(("down",)), GATED),
    Row("v4 keys, gate and up only", per_expert(("gate", "up")), GATED),
    Row("v4 keys, gate only", per_expert(("gate",)), GATED),
    Row("v4 keys, up and down only", per_expert(("up", "down")), GATED),
    Row("v4 keys, some experts only", per_expert(which=lambda expert: expert in (0, 3, 6)), GATED),
    Row("v4 keys, rank by expert (rank_pattern)",
        per_expert(rank_of=lambda expert, _: 2 if expert == 3 else 4, fields=_rank_by_expert), GATED),
    Row("v4 keys, rank by matrix (rank_pattern)",
        per_expert(rank_of=lambda _, it: 2 if it == "down" else 4, fields=_of_down("rank_pattern", 2)), GATED),
    Row("v4 keys, alpha by matrix (alpha_pattern)",
        per_expert(alpha_of=lambda it: 24 if it == "down" else 8, fields=_of_down("alpha_pattern", 24)), GATED),
    Row("v4 keys, gate and up of two alphas",
        per_expert(alpha_of=lambda it: 24 if it == "up" else 8,
                   fields=lambda family: {"alpha_pattern": {names_of(family, ("up",))[0]: 24}}), GATED),
    Row("v4 keys, gate and up of two ranks",
        per_expert(rank_of=lambda _, it: 2 if it == "up" else 4,
                   fields=lambda family: {"rank_pattern": {names_of(family, ("up",))[0]: 2}}), GATED),
    Row("v4 keys, rslora", per_expert(fields=lambda _: {"use_rslora": True}), GATED),
    Row("v4 keys, rank + alpha pattern + rslora",
        per_expert(rank_of=lambda _, it: 2 if it == "down" else 4, alpha_of=lambda it: 24 if it == "down" else 8,
                   fields=_both_of_down_and_rslora), GATED),
]  # fmt: skip
OUTER = {"gate": "A", "up": "A", "down": "B"}
_STACKED = [
    Row("3-D w1, w3, w2, outer side shared (Tinker, SGLang)", stacked(OUTER), MIXTURES),
    Row("3-D, outer side shared, with attention", stacked(OUTER, attention=True), MIXTURES),
    Row("3-D, nothing shared", stacked({"gate": "", "up": "", "down": ""}), MIXTURES),
    Row("3-D, inner side shared", stacked({"gate": "B", "up": "B", "down": "A"}), MIXTURES),
    Row("3-D, both sides shared", stacked({"gate": "AB", "up": "AB", "down": "AB"}), MIXTURES),
    Row("3-D, w2 only", stacked({"down": "B"}), MIXTURES),
    Row("3-D, w1 and w3 only", stacked({"gate": "A", "up": "A"}), MIXTURES),
    Row("3-D, target_modules all-linear", stacked(OUTER, target_modules="all-linear"), MIXTURES),
]
EXPERTS = Section("experts", "LoRA on routed experts", [*_BY_PEFT, *_SWAPPED, *_V4, *_STACKED])
ROUTER = Section("router", "LoRA on a router", [
    Row("target_parameters router", lora(target_parameters=weight_of_router, target_modules=[]), MIXTURES),
    Row("attention + target_parameters router",
        lora(target_parameters=weight_of_router, target_modules=attention), MIXTURES),
    Row("target_parameters router + rslora",
        lora(target_parameters=weight_of_router, target_modules=[], use_rslora=True), MIXTURES),
    Row("target_parameters router + patterns by parameter name",
        lora(target_parameters=weight_of_router, target_modules=[], rank_pattern={r"(gate|router)\.weight": 2},
             alpha_pattern={r"(gate|router)\.weight": 24}), MIXTURES),
    Row("target_parameters router + alpha_pattern by module name",
        lora(target_parameters=weight_of_router, target_modules=[], alpha_pattern={"gate": 24, "router": 24}),
        MIXTURES),
    Row("router among target_modules", lora(target_modules=router), MIXTURES),
    Row("attention + router among target_modules",
        lora(target_modules=lambda it: [*it.attention, str(it.router)]), MIXTURES),
    Row("v4 router keys", v4_router(), MIXTURES),
    Row("v4 router keys with attention", v4_router(attention=True), MIXTURES),
    Row("v4 router keys, rslora", v4_router(rslora=True), MIXTURES),
    Row("v4 all-linear: attention, router, experts, shared experts", v4_router(everything=True), GATED),
])  # fmt: skip
