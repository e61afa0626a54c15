"""Which base models are served, and what differs between them.

A family is in the table because its parity test passes (tests/model/test_families.py): tokens of a mixed, chunked
schedule equal Transformers' own `generate`. Everything else is refused by name: an architecture that mixes tokens in a
way we do not know (recurrent layers, convolutions) would give wrong answers in silence.
"""

import difflib
import inspect
import types
from typing import Any

import torch
from torch import nn

from server.model.refused import reason_against

# A module of Transformers, or its configuration: it has what its family's file gives it, and no type knows that
Foreign = Any

FAMILIES = frozenset({
    "afmoe", "apertus", "arcee", "axk1", "axk2", "bitnet", "cohere", "cohere2", "cohere2_moe", "cwm", "dbrx",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe",
    "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text",
    "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss",
    "granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "helium",
    "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hyperclovax", "internlm3", "iquestcoder", "jais2", "kolibri1",
    "laguna", "llama", "llama4_text", "mellum", "mimo_v2_flash", "minicpm3", "minimax_m2", "ministral",
    "ministral3", "mistral", "mistral4", "mixtral", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe",
    "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3",
    "solar_open", "stablelm", "starcoder2", "vaultgemma", "youtu",
})  # fmt: skip

# families whose attention and MLP have one linear each for what others have in parts
_FUSED = frozenset({"phi3"})

# kinds of layers that mix tokens by attention; the indexed one is served up to where it sees all (max_model_len)
_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "indexed_attention"})

# frequencies of these are a function of the position alone
_STATIC_ROPES = frozenset({"default", "linear", "llama3", "proportional", "yarn"})


class UnsupportedModelError(Exception):
    """This base cannot be served exactly; the message says why."""


def check_family(config: Foreign) -> None:
    """Raise UnsupportedModelError unless the configuration is of a family that is served."""
    model_type = getattr(config, "model_type", None)
    reason = reason_against(model_type, getattr(config, "layer_types", None) or (), _KINDS)
    if reason is not None:
        raise UnsupportedModelError(f"{model_type} is not served: {reason}")
    if model_type not in FAMILIES:
        like = difflib.get_close_matches(str(model_type), FAMILIES, 3)
        raise UnsupportedModelError(
            f"model type {model_type!r} is not served; {', '.join(like) + ' are, and ' if like else ''}"
            f"docs/models.md lists all {len(FAMILIES)} that are"
        )
    _check_nested_rope(config)
    _rope(config)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError("quantised checkpoints are not served yet; use a float32, float16 or bfloat16 one")


def settle(config: Foreign) -> None:
    """Turn off what a checkpoint may have turned on for training: what a forward returns beside its logits."""
    for name in ("output_attentions", "output_hidden_states", "output_router_logits"):
        if getattr(config, name, False):
            setattr(config, name, False)
    config.return_dict = True


def _check_nested_rope(config: Foreign) -> None:
    """DBRX's checkpoints say the base of their rope in a part of the configuration where Transformers does not look."""
    said = getattr(getattr(config, "attn_config", None), "rope_theta", None)
    taken = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if said is not None and said != taken:
        raise UnsupportedModelError(
            f"attn_config says rope_theta = {said}, which Transformers does not read: it takes {taken}; add "
            f'"rope_parameters": {{"rope_type": "default", "rope_theta": {said}}} to config.json'
        )


def max_model_len(config: Foreign, asked: int) -> int:
    """The longest sequence that is served: `asked`, or the model's own limit where that is 0.

    Dynamic and long rope change all frequencies with the longest sequence of the *batch*. Dynamic rope is therefore
    served up to its original length, where it does not change; long rope to its original length by default, and
    beyond it (if asked) with the long frequencies for every request (see pin_rope). Sparse attention is served up to
    where it becomes sparse (server/model/sparse.py).
    """
    limit: int = config.max_position_embeddings
    rope = _rope(config)
    sparse_from: int | None = getattr(config, "index_topk", None)
    if asked > limit and (sparse_from is None or sparse_from > limit):
        raise UnsupportedModelError(f"max_model_len {asked} exceeds what the model was made for, {limit}")
    if sparse_from is not None and asked > sparse_from:
        raise UnsupportedModelError(
            f"max_model_len {asked}: beyond {sparse_from} tokens (index_topk) this model attends to {sparse_from} that "
            f"its indexer chooses, which is not served; up to there it attends to all: ask for at most {sparse_from}"
        )
    limit = min(limit, sparse_from or limit)
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
    """The parameters of the model's one rope. Of several, one for each kind of layer, every one must be static; then
    they need no attention, and the default's stand for them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [{"rope_type": "default", **value} for value in parameters.values() if isinstance(value, dict)]
    if not nested:
        rope = {"rope_type": "default", **parameters}
        if rope["rope_type"] not in _STATIC_ROPES | {"dynamic", "longrope"}:
            raise UnsupportedModelError(f"rope type {rope['rope_type']!r} is not served")
        return rope
    changing = sorted({value["rope_type"] for value in nested} - _STATIC_ROPES)
    if changing and len({str(value) for value in nested}) > 1:
        raise UnsupportedModelError(
            f"a rope of type {', '.join(changing)} beside another, each for its kind of layer, is not served"
        )
    return nested[0] if changing else {"rope_type": "default"}


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
