"""DoRA: W' = m * (W + sBA) / |W + sBA|, with one m and one norm an output."""

from typing import Any

import torch

from tests.census.by_peft import Tensors, cast, lora, reachable, rewritten
from tests.census.families import DEEPSEEK, EVERY, TEN, Family
from tests.census.format_makers import unsound
from tests.census.lora_rows import SMALL, attention_and_head
from tests.census.made import Row, Section

MAGNITUDE = ".lora_magnitude_vector"
DORA_ON_ATTENTION = lora(use_dora=True)


def _magnitudes_with_weight(tensors: Tensors, written: dict[str, Any], family: Family) -> Tensors:
    """As in the model's own state: PEFT's file leaves `.weight` out."""
    return {f"{key}.weight" if key.endswith(MAGNITUDE) else key: tensor for key, tensor in tensors.items()}


def _one_magnitude_lost(tensors: Tensors, written: dict[str, Any], family: Family) -> None:
    del tensors[next(key for key in sorted(tensors) if MAGNITUDE in key)]


def _without_the_flag(tensors: Tensors, written: dict[str, Any], family: Family) -> None:
    """What is right stays DoRA: taking it for a LoRA would be wrong in silence."""
    written["use_dora"] = False


def _flag_without_magnitudes(tensors: Tensors, written: dict[str, Any], family: Family) -> None:
    for key in [key for key in tensors if MAGNITUDE in key]:
        del tensors[key]


DORA = Section("dora", "DoRA", [
    Row("use_dora", DORA_ON_ATTENTION, EVERY),
    Row("use_dora + rslora", lora(use_dora=True, use_rslora=True), EVERY),
    Row("use_dora + rank_pattern", lora(use_dora=True, rank_pattern={"o_proj": 2}), EVERY),
    Row("use_dora + alpha_pattern", lora(use_dora=True, alpha_pattern={"o_proj": 24}), TEN),
    Row("use_dora on every linear that PEFT can reach", lora(use_dora=True, target_modules=reachable), EVERY),
    Row("use_dora all-linear", lora(use_dora=True, target_modules="all-linear"), EVERY),
    Row("use_dora, some layers", lora(use_dora=True, layers_to_transform=[1, 2]), TEN),
    Row("use_dora on lm_head", lora(SMALL, use_dora=True, target_modules=["lm_head"]), TEN),
    Row("use_dora on attention + lm_head", lora(SMALL, use_dora=True, target_modules=attention_and_head), EVERY),
    Row("use_dora on attention + lm_head (default save)", lora(use_dora=True, target_modules=attention_and_head), TEN),
    Row("use_dora on kv_b_proj alone", lora(use_dora=True, target_modules=["kv_b_proj"]), DEEPSEEK),
    Row("use_dora on kv_a_proj_with_mqa alone", lora(use_dora=True, target_modules=["kv_a_proj_with_mqa"]), DEEPSEEK),
    Row("use_dora on embed_tokens", lora(use_dora=True, target_modules=["embed_tokens"]), TEN),
    Row("use_dora + bias all", lora(use_dora=True, bias="all"), EVERY),
    Row("use_dora, saved in bfloat16", cast(torch.bfloat16, DORA_ON_ATTENTION), TEN),
    Row("use_dora, keys lora_magnitude_vector.weight", rewritten(_magnitudes_with_weight, DORA_ON_ATTENTION), TEN),
    Row("use_dora, one magnitude missing", unsound(_one_magnitude_lost, DORA_ON_ATTENTION), TEN),
    Row("use_dora, no magnitude in the file", unsound(_flag_without_magnitudes, DORA_ON_ATTENTION), TEN),
    Row("use_dora false, magnitudes in the file", rewritten(_without_the_flag, DORA_ON_ATTENTION), TEN),
])  # fmt: skip
