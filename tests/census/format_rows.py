"""Forms that PEFT 0.21 does not write: older versions', other tools', and what goes wrong on the way."""

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.census import format_makers as forms
from tests.census.by_peft import configured, lora, rewritten
from tests.census.families import DENSE, TEN
from tests.census.format_makers import renamed
from tests.census.lora_rows import SMALL, attention_and_head
from tests.census.made import Maker, Row, Section

WITH_HEAD = lora(SMALL, target_modules=attention_and_head)
SPLIT = tuple(name for name in DENSE if name != "phi3")  # q, k and v, gate and up are linears of their own
MODEL, LANGUAGE = "base_model.model.model.", "base_model.model."


def only(*keys: str) -> Maker:
    """The configuration has these keys and no others."""

    def keep(tensors: object, written: dict[str, Any], family: object) -> None:
        for key in set(written) - set(keys):
            del written[key]

    return rewritten(keep)


def moved(old: str, new: str) -> Callable[[str], str]:
    """A key that begins with `old` begins with `new`; others stay."""
    return lambda key: new + key.removeprefix(old) if key.startswith(old) else key


_OLD = ("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout",
        "modules_to_save", "peft_type", "r", "target_modules", "task_type")  # fmt: skip
_CONFIGURATIONS = [
    Row("PEFT 0.5 config, safetensors", only(*_OLD, "auto_mapping", "init_lora_weights", "layers_pattern",
                                             "layers_to_transform", "revision"), TEN),
    Row("PEFT 0.2 config, safetensors", rewritten(forms.peft_0_2), TEN),
    Row("torchtune config (4 keys)", only("r", "lora_alpha", "target_modules", "peft_type"), TEN),
    Row("unknown key that is null", configured(lora_nums=None), TEN),
    Row("unknown key with a number (lora_nums)", configured(lora_nums=2), TEN),
    Row("unknown key with a number, ignored by name", forms.ignoring("lora_nums", 2), TEN),
    Row("unknown key with true", configured(use_something=True), TEN),
    Row("unknown key with an object", configured(something_config={"size": 2}), TEN),
    Row("unknown key with a text (unsloth_version)", configured(unsloth_version="2026.1.4"), TEN),
    Row("unknown key with a text (_comment)", configured(_comment="trained on Sunday"), TEN),
    *(Row(f"task_type {task} on a decoder", configured(task_type=task), TEN)
      for task in ("SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")),
    Row("task_type unknown", configured(task_type="CHAT"), TEN),
    Row("no target_modules", configured(target_modules=None), TEN),
    Row("declares another base of the same shapes", configured(base_model_name_or_path="org/another"), TEN),
    Row("bias all set by hand, no bias in the file", configured(bias="all"), TEN),
    Row("no adapter_config.json", forms.without_config, TEN),
]  # fmt: skip
_PREFIXES = [
    Row("keys without base_model.model.", renamed(moved(LANGUAGE, "")), TEN),
    Row("keys with base_model.model. twice", renamed(moved(LANGUAGE, LANGUAGE * 2)), TEN),
    Row("keys with adapter name (.default.)", renamed(lambda it: it.replace(".weight", ".default.weight")), TEN),
    Row("keys of two adapter names in one file", forms.two_names, TEN),
    Row("torch.compile prefix, inside", renamed(moved(LANGUAGE, f"{LANGUAGE}_orig_mod.")), TEN),
    Row("torch.compile prefix, outside", renamed(moved("", "_orig_mod.")), TEN),
    Row("VLM prefix, v5 (model.language_model.layers)", renamed(moved(MODEL, f"{MODEL}language_model.")), TEN),
    Row("VLM prefix, v4 (language_model.model.layers)", renamed(moved(LANGUAGE, f"{LANGUAGE}language_model.")), TEN),
    Row("VLM prefix, v5, lm_head beside", renamed(moved(MODEL, f"{MODEL}language_model."), WITH_HEAD), TEN),
    Row("VLM prefix, v4, language_model.lm_head",
        renamed(moved(LANGUAGE, f"{LANGUAGE}language_model."), WITH_HEAD), TEN),
    Row("VLM prefix, v4, lm_head beside", renamed(moved(MODEL, f"{LANGUAGE}language_model.model."), WITH_HEAD), TEN),
    Row("VLM prefix, v5, and a vision tower's tensors with B = 0", forms.with_vision(0.0), TEN),
    Row("VLM prefix, v5, and a vision tower's tensors", forms.with_vision(0.1), TEN),
    Row("VLM prefix on some keys only", forms.mixed_prefixes, TEN),
    Row("VLM prefix and a doubled base_model.model.",
        renamed(moved(MODEL, f"{LANGUAGE}{MODEL}language_model.")), TEN),
    Row("VLM prefix, v5, DoRA",
        renamed(moved(MODEL, f"{MODEL}language_model."), lora(use_dora=True)), TEN),
]  # fmt: skip
_FILES = [
    Row("adapter_model.bin only", forms.pickled(beside=False), TEN),
    Row("safetensors beside .bin", forms.pickled(beside=True), TEN),
    Row("two shards + index", forms.sharded, TEN),
    Row("float64 tensors", rewritten(lambda it, *_: {key: tensor.double() for key, tensor in it.items()}), TEN),
    Row("ZeRO-3 hole (empty tensors)", forms.with_a_hole, TEN),
    Row("ranks pruned per module, no rank_pattern", forms.pruned(listed=False), TEN),
    Row("ranks pruned per module, in rank_pattern", forms.pruned(listed=True), TEN),
    Row("tensors of the first two layers only", forms.two_layers, TEN),
    Row("adapter of a deeper model", forms.deeper, TEN),
    Row("adapter of a wider model", forms.wider, TEN),
    Row("with an equal copy of lm_head", partial(forms.with_head, copy=True), TEN),
    Row("with another lm_head.weight, modules_to_save null", partial(forms.with_head, copy=False), TEN),
    Row("an A without its B", forms.half_a_pair, TEN),
]
_TOOLS = [
    Row("MLX-LM adapters.safetensors", forms.mlx, TEN),
    Row("Tinker raw export (attn, unembed_tokens)",
        renamed(lambda it: it.replace(".self_attn.", ".attn.").replace(".lm_head.", ".model.unembed_tokens."),
                WITH_HEAD), TEN),
    Row("fused qkv_proj keys on split q, k, v", forms.fused(forms.QKV), SPLIT),
    Row("fused gate_up_proj keys on split gate, up", forms.fused(forms.GATE_UP), SPLIT),
    Row("split q, k, v keys on a fused qkv_proj", forms.split(forms.QKV), ("phi3",)),
    Row("split gate, up keys on a fused gate_up_proj", forms.split(forms.GATE_UP), ("phi3",)),
    Row("split q and v keys only on a fused qkv_proj", forms.split(forms.QKV, ("q_proj", "v_proj")),
        ("phi3",)),
]  # fmt: skip
FORMATS = Section("formats", "Forms that PEFT does not write", [
    *_CONFIGURATIONS, *_PREFIXES, *_FILES, *_TOOLS,
])  # fmt: skip
