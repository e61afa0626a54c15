"""Tiny random models of every served family, made from configurations; nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB = 199
NEW_TOKENS = 10

_BASE = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    tie_word_embeddings=False,
)  # fmt: skip
_MOE = dict(moe_intermediate_size=48, num_experts_per_tok=2)
_MLA = dict(
    q_lora_rank=None, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, num_key_value_heads=4,
    first_k_dense_replace=1, n_shared_experts=2, n_routed_experts=8,
)  # fmt: skip


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_type": rope_type, "rope_theta": 1e4, **parameters}


# name -> (model type, what differs from _BASE)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", dict(tie_word_embeddings=True)),
    "llama-rope3": ("llama", dict(rope_parameters=_rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32))),
    "llama-yarn": ("llama", dict(rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=32))),
    "llama-dynamic": ("llama", dict(rope_parameters=_rope("dynamic", factor=4.0), max_position_embeddings=64)),
    "mistral-window": ("mistral", dict(sliding_window=7)),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=2)),
    "qwen3": ("qwen3", dict(head_dim=24)),
    "gemma2": ("gemma2", dict(sliding_window=7, head_dim=24, query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
                              final_logit_softcapping=3.0)),
    "phi3": ("phi3", dict(sliding_window=7)),
    "phi3-longrope": ("phi3", dict(sliding_window=None, max_position_embeddings=128,
                                   original_max_position_embeddings=64, rope_parameters=_rope(
        "longrope", original_max_position_embeddings=64, short_factor=[1.0] * 8, long_factor=[4.0] * 8))),
    "olmoe": ("olmoe", dict(num_experts=8, num_experts_per_tok=2)),
    "mixtral-window": ("mixtral", dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=7)),
    "qwen2_moe": ("qwen2_moe", dict(num_experts=8, shared_expert_intermediate_size=40, **_MOE)),
    "qwen2_moe-window": ("qwen2_moe", dict(num_experts=8, shared_expert_intermediate_size=40, use_sliding_window=True,
                                           sliding_window=7, max_window_layers=2, **_MOE)),
    "qwen3_moe": ("qwen3_moe", dict(num_experts=8, head_dim=24, **_MOE)),
    "deepseek_v2": ("deepseek_v2", dict(topk_method="greedy", **_MLA, **_MOE)),
    "deepseek_v2-grouped": ("deepseek_v2", dict(
        topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0, rope_parameters=_rope(
            "yarn", factor=40, beta_fast=32, beta_slow=1, mscale=0.707, mscale_all_dim=0.707,
            original_max_position_embeddings=64), **{**_MLA, "q_lora_rank": 20}, **_MOE)),
    "deepseek_v3": ("deepseek_v3", dict(n_group=4, topk_group=2, **{**_MLA, "q_lora_rank": 20}, **_MOE)),
    "gpt_oss": ("gpt_oss", dict(num_local_experts=8, num_experts_per_tok=2, head_dim=24, sliding_window=7)),
}  # fmt: skip


def make_config(name: str, **overrides: Any) -> Any:
    model_type, extra = MODELS[name]
    return CONFIG_MAPPING[model_type](**{**_BASE, **extra, **overrides})


def make_model(name: str, attention: str = "eager", seed: int = 0, **overrides: Any) -> nn.Module:
    """A float32 model whose outputs vary: weights are drawn large enough that greedy decoding does not repeat."""
    config = make_config(name, **overrides)
    torch.manual_seed(seed)  # some parameters keep what Transformers drew for them
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(noise * 0.2)
            elif "embed" in parameter_name:
                # small where tied: else the last token's own embedding wins and the model repeats it
                parameter.copy_(noise * (0.1 if config.tie_word_embeddings else 1.0))
            else:
                parameter.copy_(noise * 1.4 / parameter.shape[-1] ** 0.5)
        for buffer_name, buffer in model.named_buffers():
            if "correction_bias" in buffer_name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    return model


def reference(model: nn.Module, prompt: list[int], count: int = NEW_TOKENS) -> list[int]:
    """Greedy, by Transformers' own `generate`."""
    with torch.inference_mode():
        tokens = torch.tensor([prompt])
        # else a token of the prompt that is the padding's would be masked
        seen = torch.ones_like(tokens)
        ids = model.generate(tokens, attention_mask=seen, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return ids[0, len(prompt) :].tolist()


def save_model(directory: Path, name: str, **overrides: Any) -> Path:
    make_model(name, **overrides).save_pretrained(directory)
    return directory
