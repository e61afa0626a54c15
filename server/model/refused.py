"""Types of models that are not served, and what it would take: for the people who ask for one of them.

A type that is in neither table is refused as well, without a reason. Layers of a kind that mixes tokens in another way
than by attention are refused whatever their model's type is, with the layer's number.
"""

from collections.abc import Collection, Sequence

_STATE = (
    "each sequence would need a state of it beside the KV cache, with kernels for mixed batches and copies to go back "
    "to for shared prefixes and preemption"
)
_CACHELESS = (
    "its attention is its family's own code, which does not call Transformers' attention interface: one of ours would "
    "have to take its place"
)
_ALIBI = "its attention adds a bias that falls with the distance of tokens (ALiBi), which no kernel here adds"

_OTHER = "only attention that is full, of a sliding window or of chunks is served"

# Kinds of layers with a state, by the names that configurations give them
_RECURRENT = {
    "conv": "a short convolution",
    "hybrid": "recurrent beside its attention",
    "hybrid_sliding": "recurrent beside its attention",
    "linear_attention": "recurrent",
    "mamba": "recurrent",
}

REFUSED = {
    "bailing_hybrid": f"most of its layers are delta nets; {_STATE}",
    "bamba": f"most of its layers are Mamba-2; {_STATE}",
    "bloom": _ALIBI,
    "codegen": _CACHELESS,
    "deepseek_v4": "it attends to compressed keys that it chooses, through hyper-connections between layers",
    "diffllama": "a layer calls attention twice, with halves of its values, and subtracts: two caches a layer",
    "doge": "it makes attention masks from what tokens hold, which paged attention does not take",
    "dots3_note_text": "it chooses what it attends to in some layers and has windows in others",
    "falcon": f"{_CACHELESS} (and some of its models have ALiBi)",
    "falcon_h1": f"Mamba-2 runs beside attention in every layer, whatever layer_types says; {_STATE}",
    "falcon_mamba": f"its layers are Mamba; {_STATE}",
    "gpt_neo": _CACHELESS,
    "gptj": _CACHELESS,
    "hy_v4": "its experts clamp gate and up before SiLU: kernels/gated would need that activation",
    "inkling_text": f"short convolutions run beside attention; {_STATE}",
    "jamba": f"most of its layers are Mamba; {_STATE}",
    "jetmoe": "its attention is a mixture of experts too, which adapters and KV cache would have to know",
    "kimi_linear": f"three of four layers are Kimi delta attention; {_STATE}",
    "lfm2": f"most of its layers are short convolutions; {_STATE}",
    "lfm2_moe": f"most of its layers are short convolutions; {_STATE}",
    "lfm3": f"some of its layers are short convolutions; {_STATE}",
    "longcat_flash": "a layer attends twice and some experts compute nothing: two caches a layer, routes to nowhere",
    "mamba": f"its layers are Mamba; {_STATE}",
    "mamba2": f"its layers are Mamba-2; {_STATE}",
    "minimax": f"most of its layers are lightning attention; {_STATE}",
    "mpt": _ALIBI,
    "nemotron_h": f"most of its layers are Mamba-2; {_STATE}",
    "olmo_hybrid": f"most of its layers are gated delta nets; {_STATE}",
    "qwen3_5_moe_text": f"three of four layers are gated delta nets; {_STATE}",
    "qwen3_5_text": f"three of four layers are gated delta nets; {_STATE}",
    "qwen3_next": f"three of four layers are gated delta nets; {_STATE}",
    "recurrent_gemma": f"two of three layers are recurrent; {_STATE}",
    "rwkv": f"its layers are recurrent; {_STATE}",
    "xlstm": f"its layers are recurrent; {_STATE}",
    "zamba": f"most of its layers are Mamba; {_STATE}",
    "zamba2": f"most of its layers are Mamba-2; {_STATE}",
    "zaya": f"short convolutions run beside attention; {_STATE}",
}


def reason_against(model_type: str | None, kinds: Sequence[str], served: Collection[str]) -> str | None:
    """Why a model of this type, with layers of these kinds, is not served; None: nothing is known against it.

    served: the kinds that are.
    """
    known = REFUSED.get(model_type or "")
    index = next((index for index, kind in enumerate(kinds) if kind not in served), None)
    if index is None:
        return known
    what = _RECURRENT.get(kinds[index])
    layer = f"layer {index} of {len(kinds)} is {kinds[index]}" + (f", which is {what}" if what else "")
    return f"{layer}: {known or (_STATE if what else _OTHER)}"
