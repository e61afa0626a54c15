"""Which base models are served, and what differs between them.

A family is in the table because its parity test passes (tests/model/test_families.py): tokens of a mixed, chunked
schedule equal Transformers' own `generate`. Everything else is refused by name: an architecture that mixes tokens in a
way we do not know (recurrent layers, convolutions, other masks) would give wrong answers in silence.
"""

import inspect
import types
from typing import Any

import torch
from torch import nn

# A module of Transformers, or its configuration: it has what its family's file gives it, and no type knows that
Foreign = Any
LayerWindow = int | None  # sliding window in tokens; None is full attention

FAMILIES = frozenset({
    "deepseek_v2", "deepseek_v3", "gemma2", "gpt_oss", "llama", "mistral", "mixtral", "olmoe", "phi3", "qwen2",
    "qwen2_moe", "qwen3", "qwen3_moe",
})  # fmt: skip

# families whose attention has a window at all, and those that may have it in some layers only
_MIXED_WINDOWS = frozenset({"gemma2", "gpt_oss", "qwen2", "qwen2_moe", "qwen3"})
_WINDOWED = _MIXED_WINDOWS | {"mistral", "mixtral", "phi3", "qwen3_moe"}

# families whose attention and MLP have one linear each for what others have in parts
_FUSED = frozenset({"phi3"})

# frequencies of these are a function of the position alone
_STATIC_ROPES = frozenset({"default", "linear", "llama3", "yarn"})


class UnsupportedModelError(Exception):
    """This base cannot be served exactly; the message says why."""


def check_family(config: Foreign) -> None:
    """Raise UnsupportedModelError unless the configuration is of a family that is served."""
    model_type = getattr(config, "model_type", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = sorted(kinds - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError(
            f"{model_type} has layers of type {', '.join(unknown)}; only full and sliding-window attention are served"
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not served; these are: {', '.join(sorted(FAMILIES))}"
        )
    for key, harmless in (("is_causal", (None, True)), ("attention_chunk_size", (None,))):
        if getattr(config, key, None) not in harmless:
            raise UnsupportedModelError(f"{key} = {getattr(config, key)} is not served: it changes who sees whom")
    window = getattr(config, "sliding_window", None)
    if window is not None and model_type not in _WINDOWED:
        raise UnsupportedModelError(f"sliding_window = {window} has no effect in {model_type} models; remove it")
    if len(kinds) > 1 and model_type not in _MIXED_WINDOWS:
        raise UnsupportedModelError(f"{model_type} models with both full and sliding-window layers are not served")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError("quantised checkpoints are not served yet; use a float32, float16 or bfloat16 one")


def layer_windows(config: Foreign) -> list[LayerWindow]:
    """The window of each layer, from the configuration.

    Never from the attention call: some families do not pass it there (Qwen2-MoE), and full attention in place of a
    window is wrong without any error.
    """
    num_layers: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        uses_window = window is not None and getattr(config, "use_sliding_window", True)
        return [window if uses_window else None] * num_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def max_model_len(config: Foreign, asked: int) -> int:
    """The longest sequence that is served: `asked`, or the model's own limit where that is 0.

    Dynamic and long rope change all frequencies with the longest sequence of the *batch*. Dynamic rope is therefore
    served up to its original length, where it does not change; long rope to its original length by default, and
    beyond it (if asked) with the long frequencies for every request (see pin_rope).
    """
    limit: int = config.max_position_embeddings
    rope = _rope(config)
    if rope["rope_type"] not in _STATIC_ROPES | {"dynamic", "longrope"}:
        raise UnsupportedModelError(f"rope type {rope['rope_type']!r} is not served")
    if asked > limit:
        raise UnsupportedModelError(f"max_model_len {asked} exceeds what the model was made for, {limit}")
    if rope["rope_type"] == "longrope" and not asked:
        return min(limit, int(rope["original_max_position_embeddings"]))
    return asked or limit


def pin_rope(model: nn.Module, config: Foreign, length: int) -> None:
    """Fix dynamic and long rope to one set of frequencies, so that no request changes another's.

    Transformers chooses the set anew in each forward, by the longest position of the batch; that is also a read-back
    from the device, which a captured graph cannot have. Up to the original length both start with the right set. Beyond
    it, every request gets the long set, as the longest allowed one would.
    """
    rope = _rope(config)
    if rope["rope_type"] not in ("dynamic", "longrope"):
        return
    is_long = rope["rope_type"] == "longrope" and length > int(rope["original_max_position_embeddings"])
    module: Foreign
    for module in model.modules():
        if hasattr(module, "original_inv_freq"):
            if is_long:
                from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

                long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, None, seq_len=length)
                with torch.no_grad():
                    module.inv_freq.copy_(long)
            unchanging = torch.no_grad()(inspect.unwrap(type(module).forward))
            module.forward = types.MethodType(unchanging, module)


def _rope(config: Foreign) -> dict[str, Any]:
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = next((value for value in parameters.values() if isinstance(value, dict)), None)
    if nested is not None and len({str(value) for value in parameters.values()}) > 1:
        raise UnsupportedModelError("a rope of its own for each kind of layer is not served")
    return {"rope_type": "default", **(nested or parameters)}


def fused_rows(config: Foreign, name: str, out_features: int) -> tuple[int, ...] | None:
    """Rows of each part of a linear that other families have in parts, in order: q, k, v or gate, up. None: it is no
    such linear, or its family is not known to have them in this order."""
    if config.model_type not in _FUSED:
        return None
    match name.rpartition(".")[2]:
        case "qkv_proj":
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
            rows = tuple(width * count for count in heads)
        case "gate_up_proj":
            rows = (out_features // 2,) * 2
        case _:
            return None
    return rows if sum(rows) == out_features else None


def stop_token_ids(config: Foreign, generation_config: Foreign | None) -> frozenset[int]:
    """End-of-sequence ids: those of the generation configuration if it names any, else the model's."""
    for source in (generation_config, config):
        eos = getattr(source, "eos_token_id", None)
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()
