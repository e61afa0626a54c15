"""Tiny random models of every served family (tiny_families.py); nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from server.model.unlisted import list_unlisted
from tests.support.tiny_families import BASE, MODELS, VOCAB

__all__ = ["MODELS", "NEW_TOKENS", "VOCAB", "make_config", "make_model", "reference", "save_model"]

NEW_TOKENS = 10


def make_config(name: str, **overrides: Any) -> Any:
    model_type, extra = MODELS[name]
    return CONFIG_MAPPING[model_type](**{**BASE, **extra, **overrides})


def make_model(name: str, attention: str = "eager", seed: int = 0, **overrides: Any) -> nn.Module:
    """A float32 model whose outputs vary: weights are drawn large enough that greedy decoding does not repeat."""
    config = make_config(name, **overrides)
    list_unlisted()
    torch.manual_seed(seed)  # some parameters keep what Transformers drew for them
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    transposed = {f"{name}.weight" for name, it in model.named_modules() if isinstance(it, Conv1D)}
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.add_(noise * 0.2)
            elif "embed" in parameter_name:
                # small where tied: else the last token's own embedding wins and the model repeats it
                parameter.copy_(noise * (0.1 if config.tie_word_embeddings else 1.0))
            else:
                inputs = parameter.shape[0] if parameter_name in transposed else parameter.shape[-1]
                parameter.copy_(noise * 1.4 / inputs**0.5)
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
