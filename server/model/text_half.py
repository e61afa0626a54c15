"""The text half of a multimodal checkpoint, as the plain causal model that it is.

Its towers for images, video or sound are not served, and their tensors are never read. Prompts of text alone see
nothing of them: positions along several axes are then equal, so rotary embeddings are the plain ones.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig

from server.model.checkpoint import weight_files
from server.model.families import Foreign, UnsupportedModelError

_LLAVA = "vision_tower multi_modal_projector image_newline"
_AUDIO = "audio_tower multi_modal_projector"
_GEMMA = "vision_tower audio_tower embed_vision embed_audio"
_IDEFICS = "vision_model connector perceiver_resampler"
_JANUS = "vision_model aligner vqmodel generation_embeddings generation_aligner generation_head"
_OMNI = "visual audio_tower talker token2wav code2wav"

# type of the whole -> modules that are not served, as its checkpoints name them, with or without a "model." before
PARTS: dict[str, str] = {
    "aria": _LLAVA,
    "audioflamingo3": _AUDIO,
    "aya_vision": _LLAVA,
    "cohere2_vision": _LLAVA,
    "deepseek_vl": "vision_model aligner",
    "deepseek_vl_hybrid": "vision_model aligner high_res_vision_model high_res_vision_neck high_res_vision_proj "
                          "high_res_vision_alpha",
    "ernie4_5_vl_moe": "vision_model vision_tower resampler_model",
    "exaone4_5": "visual",
    "fast_vlm": _LLAVA,
    "fun_asr_nano": f"{_AUDIO} audio_adaptor",
    "fuyu": "vision_embed_tokens",
    "gemma3": _LLAVA,
    "gemma3n": _GEMMA,
    "gemma4": _GEMMA,
    "gemma4_unified": f"{_GEMMA} vision_embedder",
    "glm46v": "visual",
    "glm4v": "visual",
    "glm4v_moe": "visual",
    "glm_ocr": "visual",
    "glmasr": _AUDIO,
    "glmga": "visual",
    "got_ocr2": _LLAVA,
    "granite4_vision": f"{_LLAVA} layerwise_projectors spatial_projectors",
    "granite_speech": "encoder projector",
    "granite_speech_plus": "encoder projector",
    "hyperclovax_vision_v2": "vision_model projector vision_projector",
    "idefics2": _IDEFICS,
    "idefics3": _IDEFICS,
    "internvl": _LLAVA,
    "janus": _JANUS,
    "kimi_k25": "vision_tower mm_projector",
    "lighton_ocr": "vision_encoder vision_projection",
    "llama4": "vision_model multi_modal_projector",
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_next_video": _LLAVA,
    "llava_onevision": _LLAVA,
    "mistral3": _LLAVA,
    "moss_transcribe_diarize": _AUDIO,
    "musicflamingo": _AUDIO,
    "ovis2": "vision_tower visual_embeddings_table",
    "paddleocr_vl": "visual projector mlp_AR",
    "perception_lm": _LLAVA,
    "qianfan_ocr": f"{_LLAVA} vision_model mlp1",
    "qwen2_5_omni": _OMNI,
    "qwen2_5_omni_thinker": _OMNI,
    "qwen2_5_vl": "visual",
    "qwen2_audio": _AUDIO,
    "qwen2_vl": "visual",
    "qwen3_5": "visual",
    "qwen3_5_moe": "visual",
    "qwen3_asr": _AUDIO,
    "qwen3_omni_moe": _OMNI,
    "qwen3_omni_moe_thinker": _OMNI,
    "qwen3_vl": "visual",
    "qwen3_vl_moe": "visual",
    "smolvlm": _IDEFICS,
    "vibevoice_asr": "acoustic_tokenizer_encoder semantic_tokenizer_encoder multi_modal_projector",
    "video_llama_3": "vision_model projector",
    "video_llava": "image_tower video_tower multi_modal_projector",
    "vipllava": _LLAVA,
    "voxtral": _AUDIO,
}  # fmt: skip


def _as_it_is(text: Foreign) -> dict[str, object]:
    return {}


def _ernie_vl(text: Foreign) -> dict[str, object]:
    kinds = list(text.mlp_layer_types)
    dense = kinds.count("dense")
    if kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
        raise UnsupportedModelError("ernie4_5_vl_moe with a dense layer above a layer of experts is not served")
    return {"moe_intermediate_size": text.moe_intermediate_size[0], "moe_layer_start_index": dense}


# type of the text half, where it has one of its own -> the plain family that it equals, and settings that this needs
_PLAIN: dict[str, tuple[str, Callable[[Foreign], dict[str, object]]]] = {
    "ernie4_5_vl_moe_text": ("ernie4_5_moe", _ernie_vl),
    "glm4v_text": ("glm4", _as_it_is),
    "glm4v_moe_text": ("glm4_moe", _as_it_is),
    "glm_ocr_text": ("glm4", lambda text: {"attention_bias": False}),
    # Ernie 4.5 but for its rope, which rotates halves
    "granite4_vision_text": ("granite", _as_it_is),
    "paddleocr_vl_text": ("llama", lambda text: {"attention_bias": text.use_bias, "mlp_bias": text.use_bias}),
    "qwen2_5_omni_text": ("qwen2", _as_it_is),
    "qwen2_5_vl_text": ("qwen2", _as_it_is),
    "qwen2_vl_text": ("qwen2", _as_it_is),
    "qwen3_omni_moe_text": ("qwen3_moe", _as_it_is),
    "qwen3_vl_moe_text": ("qwen3_moe", lambda text: {"norm_topk_prob": True}),
    "qwen3_vl_text": ("qwen3", _as_it_is),
}

REFUSED = {
    "idefics": "its text layers read images through cross-attention",
    "mllama": "its text layers read images through cross-attention",
    "paligemma": "it reads a whole prompt at once (bidirectional prefix), not from left to right",
    "shieldgemma2": "it classifies images",
    "voxtral_realtime": "its text layers depend on the delay of the sound",
}

_OF_AXES = ("mrope_section", "mrope_interleaved")  # which axis turns which frequency: none matters where all are equal
_TEXT = re.compile(r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)*")
_LAYERS = re.compile(r"^model\.(?:blocks|encoder\.layers)\.")  # as Transformers saves Kimi's and Qianfan's


class _Slice(Protocol):
    """A tensor of a file, read when it is indexed."""

    def __getitem__(self, index: Any) -> Tensor: ...

    def get_shape(self) -> list[int]: ...


class _Changed:
    """What a tensor becomes, when it is read."""

    def __init__(self, tensor: _Slice, change: Callable[[Tensor], Tensor]) -> None:
        self._tensor, self._change = tensor, change

    def __getitem__(self, index: Any) -> Tensor:
        return self._change(self._tensor[...])[index]


def _turned(tensor: Tensor) -> Tensor:
    return tensor.transpose(-2, -1).contiguous()


@dataclass(frozen=True)
class TextHalf:
    """config: of the plain model, which says what it is half of (`text_half_of`)."""

    config: Foreign
    _parts: frozenset[str]
    _text_type: str

    @contextmanager
    def opened(self, model_dir: Path) -> Iterator[dict[str, Any]]:
        """Tensors of the half by their plain names, not yet read; with them whatever belongs to no known part, under
        its own name. Raises UnsupportedModelError where two tensors would be one, and where there are none."""
        with ExitStack() as stack:
            found: dict[str, Any] = {}
            for file in weight_files(model_dir):
                opened = stack.enter_context(safe_open(file, framework="pt"))
                for key in opened.keys():
                    name = self.plain_name(key)
                    if name in found:
                        raise UnsupportedModelError(f"the checkpoint has two tensors for {name}; one of them is {key}")
                    if name is not None:
                        found[name] = self._as_plain(name, opened.get_slice(key))
            yield found

    def plain_name(self, key: str) -> str | None:
        """What the plain model calls this tensor of the checkpoint; None: it is of a part that is not served."""
        name = key.removeprefix("thinker.")
        if name.removeprefix("model.").partition(".")[0] in self._parts:
            return None
        inner = _TEXT.sub("", name, count=1)
        if inner != name:
            name = inner if inner.startswith("lm_head.") else _LAYERS.sub("model.layers.", f"model.{inner}")
        return None if self._is_of_images(name) else name

    def _is_of_images(self, name: str) -> bool:
        """Ernie 4.5 VL keeps the experts of images behind those of text, in the same layers."""
        if self._text_type != "ernie4_5_vl_moe_text":
            return False
        expert = re.search(r"\.mlp\.experts\.(\d+)\.", name)
        return name.endswith(".mlp.gate.weight_1") or (expert is not None and int(expert[1]) >= self.config.num_experts)

    def _as_plain(self, name: str, tensor: _Slice) -> _Slice | _Changed:
        match self._text_type:
            case "qwen3_vl_moe_text":
                return _qwen3_experts(self.config, name, tensor)
            case "ernie4_5_vl_moe_text" if name.endswith(".mlp.gate.weight"):
                return _Changed(tensor, _turned)
            case "ernie4_5_vl_moe_text" if name.endswith(".e_score_correction_bias"):
                return _Changed(tensor, lambda of_both: of_both[:1].contiguous())  # of text, of images
        return tensor


def _qwen3_experts(config: Foreign, name: str, tensor: _Slice) -> _Slice | _Changed:
    """[E, in, out] as published, [E, out, in] as Transformers saves them again, and as we want them."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    if name.endswith(".mlp.experts.gate_up_proj"):
        published = [hidden, 2 * inner]
    elif name.endswith(".mlp.experts.down_proj"):
        published = [inner, hidden]
    else:
        return tensor
    if published[0] == published[1]:
        raise UnsupportedModelError(
            f"{name} is square ({hidden} x {hidden}), so whether its rows are inputs or outputs cannot be told"
        )
    return _Changed(tensor, _turned) if tensor.get_shape()[1:] == published else tensor


def text_half(config: Foreign) -> TextHalf | None:
    """The half that is served of a multimodal checkpoint; None for a checkpoint of text alone, or of a type that is
    not known. Raises UnsupportedModelError for one whose text half cannot be served alone."""
    whole = str(config.model_type)
    if whole in REFUSED:
        raise UnsupportedModelError(f"model type {whole!r} is not served, nor its text half alone: {REFUSED[whole]}")
    if whole not in PARTS:
        return None
    text = config.get_text_config()
    plain = _plain_config(text)
    # as the whole model has them, which is where checkpoints keep them
    plain.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    generation = GenerationConfig.from_model_config(config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(plain, name, getattr(generation, name))
    if getattr(config, "quantization_config", None) is not None:
        plain.quantization_config = config.quantization_config
    plain.text_half_of = whole
    return TextHalf(plain, frozenset(PARTS[whole].split()), str(text.model_type))


def type_of(config: Foreign) -> str:
    """The plain family, for people: with what it is the text half of."""
    whole = getattr(config, "text_half_of", None)
    return f"{config.model_type}, the text half of {whole}" if whole else str(config.model_type)


def _plain_config(text: Foreign) -> Foreign:
    if text.model_type not in _PLAIN:
        return copy.deepcopy(text)
    model_type, settings = _PLAIN[text.model_type]
    values = {key: value for key, value in text.to_dict().items() if key != "model_type"}
    rope = {key: value for key, value in (values.get("rope_parameters") or {}).items() if key not in _OF_AXES}
    # what one class takes for unsaid, the other has another value for
    values["rope_parameters"] = {"partial_rotary_factor": 1.0, **rope}
    return CONFIG_MAPPING[model_type](**{**values, **settings(text)})
