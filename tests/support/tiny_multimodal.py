"""Tiny random multimodal models: each a text half of the usual tiny sizes beside towers that text never reaches."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import CONFIG_MAPPING, SiglipVisionConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from tests.support.tiny_models import VOCAB

_TEXT = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=None, pad_token_id=0, head_dim=16,
)  # fmt: skip
_EXPERTS = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48)
_WINDOWS = dict(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=7)

_LINEAR = dict(layer_types=["linear_attention", "full_attention"] * 2, linear_num_key_heads=2, linear_num_value_heads=4,
               linear_key_head_dim=16, linear_value_head_dim=16)  # fmt: skip


def _axes(*sections: int, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*sections], **more}}


# type of the text half -> what it needs beside _TEXT
_TEXTS: dict[str, dict[str, Any]] = {
    "aria_text": dict(moe_num_experts=8, moe_topk=2, moe_num_shared_experts=1),
    "cohere2": _WINDOWS,
    "deepseek_v3": dict(
        q_lora_rank=20, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=12, head_dim=8,
        num_key_value_heads=4, first_k_dense_replace=1, n_shared_experts=2, n_routed_experts=8, n_group=4, topk_group=2,
        moe_intermediate_size=48, num_experts_per_tok=2),
    "ernie4_5_vl_moe_text": dict(
        moe_num_experts=8, moe_k=2, moe_intermediate_size=[48, 24], moe_num_shared_experts=1, **_axes(3, 3, 2)),
    "exaone4": _WINDOWS,
    "gemma2": dict(_WINDOWS, query_pre_attn_scalar=16, final_logit_softcapping=None),
    "gemma3_text": dict(_WINDOWS, query_pre_attn_scalar=16),
    "gemma3n_text": dict(
        _WINDOWS, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=16, laurel_rank=8,
        num_kv_shared_layers=2, activation_sparsity_pattern=[0.5, 0.0, 0.0, 0.0]),
    "gemma4_text": dict(
        _WINDOWS, global_head_dim=32, vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=16,
        num_kv_shared_layers=2),
    "gemma4_unified_text": dict(_WINDOWS, global_head_dim=32),
    "glm4v_text": _axes(2, 2, 4),
    "glm4v_moe_text": dict(
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, first_k_dense_replace=1, n_group=1,
        topk_group=1, **_axes(1, 1, 2)),
    "glm_ocr_text": _axes(2, 2, 4),
    "granite4_vision_text": dict(logits_scaling=4.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "granite": dict(logits_scaling=4.0, embedding_multiplier=2.0, residual_multiplier=0.5, attention_multiplier=0.3),
    "llama4_text": dict(intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1),
    "mistral": dict(sliding_window=7),
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "paddleocr_vl_text": _axes(2, 3, 3),
    "qwen2_5_omni_text": _axes(2, 3, 3),
    "qwen2_5_vl_text": _axes(2, 3, 3),
    "qwen2_vl_text": _axes(2, 3, 3),
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": dict(_LINEAR, shared_expert_intermediate_size=40, **_EXPERTS),
    "qwen3_omni_moe_text": dict(_EXPERTS, **_axes(2, 3, 3)),
    "qwen3_vl_moe_text": dict(_EXPERTS, **_axes(3, 3, 2, mrope_interleaved=True)),
    "qwen3_vl_text": _axes(3, 3, 2, mrope_interleaved=True),
}  # fmt: skip

# type of the whole -> the type of its text half in these tests, where it could have several
WHOLES: dict[str, str] = {
    "aria": "aria_text", "audioflamingo3": "qwen2", "aya_vision": "cohere2", "cohere2_vision": "cohere2",
    "deepseek_vl": "llama", "deepseek_vl_hybrid": "llama", "ernie4_5_vl_moe": "ernie4_5_vl_moe_text",
    "exaone4_5": "exaone4", "fast_vlm": "qwen2", "fun_asr_nano": "qwen3", "fuyu": "persimmon",
    "gemma3": "gemma3_text", "gemma3n": "gemma3n_text", "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text", "glm46v": "glm4v_text", "glm4v": "glm4v_text",
    "glm4v_moe": "glm4v_moe_text", "glm_ocr": "glm_ocr_text", "glmasr": "llama", "glmga": "glm4v_text",
    "got_ocr2": "qwen2",
    "granite4_vision": "granite4_vision_text", "granite_speech": "granite", "granite_speech_plus": "granite",
    "hyperclovax_vision_v2": "hyperclovax", "idefics2": "mistral", "idefics3": "llama", "internvl": "qwen2",
    "janus": "llama", "kimi_k25": "deepseek_v3", "lighton_ocr": "qwen3", "llama4": "llama4_text", "llava": "llama",
    "llava_next": "mistral", "llava_next_video": "llama", "llava_onevision": "qwen2", "mistral3": "mistral",
    "moss_transcribe_diarize": "qwen3", "musicflamingo": "qwen2", "ovis2": "qwen2",
    "paddleocr_vl": "paddleocr_vl_text", "perception_lm": "llama", "qianfan_ocr": "qwen3",
    "qwen2_5_omni_thinker": "qwen2_5_omni_text", "qwen2_5_vl": "qwen2_5_vl_text", "qwen2_audio": "qwen2",
    "qwen2_vl": "qwen2_vl_text", "qwen3_asr": "qwen3", "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text", "qwen3_omni_moe_thinker": "qwen3_omni_moe_text",
    "qwen3_vl": "qwen3_vl_text", "qwen3_vl_moe": "qwen3_vl_moe_text", "smolvlm": "llama", "vibevoice_asr": "qwen2",
    "video_llama_3": "qwen2", "video_llava": "llama", "vipllava": "llama", "voxtral": "llama",
}  # fmt: skip

# what a type's own defaults lack
_BESIDES: dict[str, dict[str, Any]] = {
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32, "num_attention_heads": 2}},
    "fun_asr_nano": {"adaptor_config": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 16}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 1]], "downsample_rate": "4/8"},
    "gemma3n": {"audio_config": {"vocab_offset": VOCAB + 8, "vocab_size": 8}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 150},
    "qwen3_asr": {"pad_token_id": 0},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 150},
}

_TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16,
              patch_size=8)  # fmt: skip
# towers that are small enough to be there
TOWERS: dict[str, dict[str, Any]] = {
    "gemma3": {"model_type": "siglip_vision_model", **_TOWER},
    "llava": {"model_type": "clip_vision_model", **_TOWER},
    "mistral3": {"model_type": "pixtral", **_TOWER},
    "qwen2_vl": dict(depth=1, embed_dim=32, hidden_size=64, num_heads=2, mlp_ratio=2, patch_size=4),
    "qwen3_vl": dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=4,
                     deepstack_visual_indexes=[0]),
}  # fmt: skip

_TEXT_MODULES = ("model.language_model", "model.text_model", "language_model")


def make_config(whole: str, text: str | None = None, **overrides: Any) -> Any:
    """A configuration of the type `whole`; `overrides` are of its text half."""
    text = text or WHOLES[whole]
    half = {**_TEXT, **_TEXTS.get(text, {}), "model_type": text, **overrides}
    return CONFIG_MAPPING[whole](text_config=half, **_BESIDES.get(whole, {}))


def make_with_towers(whole: str) -> Any:
    """A float32 model, all of it."""
    config = make_config(whole)
    config = CONFIG_MAPPING[whole](text_config=config.text_config.to_dict(), vision_config=TOWERS[whole])
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = _class_of(whole)(config)
    _draw(text_module(model), is_tied=bool(model.all_tied_weights_keys))
    if not model.all_tied_weights_keys:
        _draw(model.lm_head, is_tied=False)
    return model.float().eval()


def make_multimodal(whole: str, text: str | None = None, tied: bool | None = None, **overrides: Any) -> Any:
    """A float32 model whose text half says something. Its towers, of the size that they have by default, have no
    memory (meta tensors): whoever asks them anything hears of it."""
    config = make_config(whole, text, **overrides)
    if whole in ("fast_vlm", "gemma3n", "perception_lm"):  # their own towers need a library that we do not have
        config.__dict__["vision_config"] = SiglipVisionConfig(
            vocab_size=8, vocab_offset=VOCAB, rms_norm_eps=1e-6, model_args={"embed_dim": 32}
        )
    if tied is not None:
        config.tie_word_embeddings = tied
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.device("meta"):
        model = _class_of(whole)(config).eval()
    path = next(it for it in _TEXT_MODULES if _has(model, it))
    torch.manual_seed(0)
    half = type(model.get_submodule(path))(model.get_submodule(path).config)
    parent, _, leaf = path.rpartition(".")
    # first, for some put tokens where the model's first parameter is
    modules = model.get_submodule(parent)._modules
    del modules[leaf]
    modules |= {leaf: half} | {name: modules.pop(name) for name in [*modules]}
    for name in ("embed_vision", "embed_audio") if whole == "gemma3n" else ():  # it asks them even for text
        model.model.get_submodule(name).to_empty(device="cpu")
    if "lm_head" in dict(model.named_children()):
        model.lm_head = nn.Linear(config.get_text_config().hidden_size, VOCAB, bias=False)
        model.tie_weights()
    _draw(half, is_tied=any("lm_head" in it for it in model.all_tied_weights_keys))
    if "lm_head" in dict(model.named_children()) and not model.all_tied_weights_keys:
        _draw(model.lm_head, is_tied=False)
    return model.float().eval()


def save(directory: Path, model: Any, published: bool) -> dict[str, torch.Tensor]:
    """Write a checkpoint, with its names as they were published or as Transformers has them now. What is of the towers
    has one element a tensor: nobody shall read it. Gives what was written."""
    state: dict[str, Any] = model.state_dict()
    for tied in model.all_tied_weights_keys:
        del state[tied]
    if published:
        state = revert_weight_conversion(model, state)
    state = {key: torch.zeros(1) if it.is_meta else it.detach().clone().contiguous() for key, it in state.items()}
    directory.mkdir(exist_ok=True)
    model.config.save_pretrained(directory)
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    return state


def text_module(model: Any) -> nn.Module:
    """Of the text half, without its head."""
    found: nn.Module = model.get_submodule(next(it for it in _TEXT_MODULES if _has(model, it)))
    return found


def _class_of(whole: str) -> Any:
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES | MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    name = (names | MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)[whole]
    return getattr(transformers, name)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _draw(module: nn.Module, is_tied: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(noise * 0.2)
            elif "embed" in name:
                parameter.copy_(noise * (0.1 if is_tied else 1.0))
            else:
                parameter.copy_(noise * 1.4 / parameter.shape[-1] ** 0.5)
        for name, buffer in module.named_buffers():
            if "correction_bias" in name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
