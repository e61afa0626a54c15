"""Causal models that Transformers has, and does not find by their configurations."""

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

_UNLISTED = {"mistral4": "Mistral4ForCausalLM"}


def list_unlisted() -> None:
    """Let its automatic classes find them; in whatever version they do so by themselves nothing changes."""
    for model_type, name in _UNLISTED.items():
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(model_type, name)
