"""What to do about an adapter that is refused: data, not logic. Facts about PEFT are those of version 0.21."""

import re

_MERGE = "merge the adapter into its base (PEFT: merge_and_unload) and serve that"
_PLAIN = "train a plain LoRA"

# peft_type values. PEFT's save_as_lora turns these into LoRA; served exactly at full rank
CONVERTIBLE = frozenset({"C3A", "DELORA", "FOURIERFT", "GRALORA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA",
                         "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT"})  # fmt: skip
# these can only be merged
MERGEABLE = frozenset({"ADALORA", "ADAMSS", "BEFT", "BOFT", "DEFT", "FROD", "GLORA", "HIRA", "HRA", "IA3",
                       "LN_TUNING", "OFT", "OSF", "PEANUT", "PVERA", "ROAD", "SHIRA", "SUPERTUNING",
                       "TRAINABLE_TOKENS"})  # fmt: skip
# these depend on the prompt or on a router, so that no weights are equal to them
OTHER_TYPES = frozenset({"ADAPTION_PROMPT", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "P_TUNING", "POLY",
                         "PREFIX_TUNING", "PROMPT_TUNING", "SHADOW", "XLORA"})  # fmt: skip

_TASK_TYPES = frozenset({"SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"})

# values of configuration keys that may be repeated in a message: PEFT's own words
WORDS = frozenset({"all", "lora_only", "none", "gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal",
                   "lora_ga", "mica"}) | _TASK_TYPES | CONVERTIBLE | MERGEABLE | OTHER_TYPES  # fmt: skip

# keys of adapter_config.json that change the arithmetic
KEYS = {
    "alora_invocation_tokens": f"an aLoRA acts from its invocation tokens on; {_PLAIN}",
    "arrow_config": "Arrow routes between several adapters; serve them one by one",
    "bias": f"train with bias='none', or {_MERGE}",
    "kasa_config": f"{_MERGE}, or {_PLAIN}",
    "layer_replication": "it makes a deeper model; build that model, serve it as a base of its own and its LoRA on it",
    "lora_bias": f"{_MERGE}, or train with lora_bias=False",
    "megatron_config": "export the adapter to Transformers' names and set the key to null",
    "modules_to_save": f"{_MERGE}, or train without modules_to_save; LoRA on lm_head is served",
    "monteclora_config": f"{_MERGE}, or {_PLAIN}",
    "trainable_token_indices": f"{_MERGE}, or train without new tokens",
    "use_bdlora": f"{_MERGE}, or {_PLAIN}",
    "velora_config": f"{_MERGE}, or {_PLAIN}",
}
UNKNOWN_KEY = (
    "if it does not (a tool's own note, say), name it in ignore_keys (heddle serve: --ignore-key), or remove it from "
    "the file"
)
INDEX = "write the index again, or remove it: the files themselves say what they hold"


def for_peft_type(peft_type: str | None) -> str:
    if peft_type is None:
        return "without the key it is not PEFT's format; convert the adapter to that"
    if peft_type in CONVERTIBLE:
        return "turn it into a LoRA with peft.save_as_lora, at the rank that loses nothing"
    if peft_type in MERGEABLE:
        return f"{_MERGE}, or {_PLAIN}"
    return _PLAIN


OTHER_MODEL = "serve the adapter on the base that it was trained on"
INCOMPLETE = "save or copy the adapter again: A and B come in pairs, and DoRA's magnitude with them"
RANKS = "if the ranks differ from module to module, list them in rank_pattern"
TWICE = "keep one of the two; if both were trained, they are two adapters"
DORA_ON_EXPERTS = f"{_MERGE}, or train with use_dora=False"
EXPERT_NAMES = (
    "name them gate_proj, up_proj and down_proj (or w1, w3 and w2), with an expert's number before it or with all "
    "experts in one tensor, and split gate_up_proj by the rows of B; PEFT's target_parameters stand at the experts' "
    "own name"
)
INTERLEAVED = (
    "train gate_up_proj itself, with PEFT's target_parameters: rows of gate and up alternate in it, and what is "
    "trained on one of them has no place there"
)

NO_EXPERTS = "LoRA on routed experts, which the base does not have there"
IMAGES = "a multimodal model's part for images or sound"
TEXT_ONLY = "train with target_modules that match the text part only"
# names of modules that the base has nothing for: (pattern, what it is, what to do). The first match counts
_MODULES = (
    (r"(?:^|\.)experts(?:\.|$)", NO_EXPERTS, OTHER_MODEL),
    (r"(?:^|\.)(?:(?:vision|image|video|audio)_(?:tower|model|encoder|projection|projector)|visual|multi_modal_projector|"
     r"mm_projector|embed_vision|embed_audio|vision_embed_tokens|connector|aligner|resampler_model|perceiver_resampler)\.",
     IMAGES, TEXT_ONLY),
    (r"\.(?:gate|router)(?:\.\w+)?$", "LoRA on a router, which it does not have there",
     f"{OTHER_MODEL}, or train without the router (gate)"),
    (r"\.(?:query_key_value|Wqkv|c_attn)$", "a fused linear, which this base has in parts",
     "split B by the outputs of q, k and v and give each part the same A"),
)  # fmt: skip


def for_module(module: str) -> tuple[str, str]:
    """What a module is that the base has nothing for, and what to do."""
    for pattern, what, remedy in _MODULES:
        if re.search(pattern, module):
            return what, remedy
    return "a module that this base does not have", OTHER_MODEL


EXPERTS_ONLY = "tune routed experts only, or serve the tuned model as a base"
# keys of an ESFT adapter that are no expert's gate, up or down matrix: (pattern, what it is, what to do)
_ESFT_TENSORS = (
    (r"experts\.(?:\d+\.)?gate_up_proj", "gate and up in one",
     "split gate_up_proj into gate_proj and up_proj, one of each an expert"),
    (r"\.experts\.(?:down_proj|w[123])$", "all experts in one", "split it by expert, as ESFT's trainer saves them"),
    (r"", "a module outside the experts",
     "tune experts only (non_expert_modules false), or serve the tuned model as a base"),
)  # fmt: skip


def for_esft_tensor(key: str) -> tuple[str, str]:
    """What a tensor is that is not a matrix of a single expert, and what to do."""
    return next((what, remedy) for pattern, what, remedy in _ESFT_TENSORS if re.search(pattern, key))


# tensors that are no A or B of a linear: (pattern, what it is, what to do). The first match counts
_TENSORS = (
    (r"\.lora_embedding_[AB]", "LoRA on an embedding", f"train without embed_tokens among target_modules, or {_MERGE}"),
    (r"\.base_layer\.weight$|\.(?:embed_tokens|lm_head)\.weight$", "a copy of a base weight",
     "if the copy equals the base's, save the adapter with save_embedding_layers=False; if it was trained or resized, "
     f"{_MERGE}"),
    (r"\.lora_magnitude_vector", "DoRA's magnitudes under another name", "save the adapter again with PEFT"),
    (r"\.lora_[AB].*\.bias$", "a LoRA's bias", KEYS["lora_bias"]),
    (r"\.bias$", "a trained bias", KEYS["bias"]),
    (r"\.modules_to_save\.", "a module that was trained whole", KEYS["modules_to_save"]),
    (r"\.token_adapter\.|trainable_tokens", "trained tokens", KEYS["trainable_token_indices"]),
)  # fmt: skip


def for_tensor(key: str) -> tuple[str, str]:
    """What a tensor is that is not the A or B of a LoRA linear, and what to do."""
    for pattern, what, remedy in _TENSORS:
        if re.search(pattern, key):
            return what, remedy
    return "the state of another method", f"{_MERGE}, or {_PLAIN}"
