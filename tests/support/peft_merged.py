"""Adapters as PEFT writes them, beside what PEFT itself makes of the model with them."""

from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from server.model.probe import PROBE
from tests.support.engine_harness import Engine, prompts
from tests.support.tiny_adapters import register
from tests.support.tiny_models import NEW_TOKENS, make_model, reference


def save_peft(directory: Path, name: str, **settings: Any) -> nn.Module:
    """The merged model."""
    lora = peft.LoraConfig(r=3, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    wrapped = peft.get_peft_model(make_model(name), lora)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in sorted(wrapped.named_parameters()):
        if ".lora_A" in key or ".lora_B" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
        elif ".lora_magnitude_vector" in key:
            parameter.data *= 1 + 0.5 * torch.randn(parameter.shape, generator=generator).abs()
    wrapped.save_pretrained(directory, save_embedding_layers=False)
    merged: nn.Module = wrapped.merge_and_unload()
    return merged


def assert_served_as_merged(name: str, adapter: Path, merged: nn.Module) -> None:
    """A mixed batch of base and adapter says what the base and the merged model say, which is not the same."""
    base, engine = make_model(name), Engine(make_model(name, attention=PROBE))
    ref = register(engine, adapter).ref
    with_it = [engine.add(prompt, NEW_TOKENS, ref) for prompt in prompts()]
    without = [engine.add(prompt, NEW_TOKENS) for prompt in prompts()]
    engine.run()
    expected, of_base = ([reference(model, prompt) for prompt in prompts()] for model in (merged, base))
    assert [request.tokens for request in with_it] == expected
    assert [request.tokens for request in without] == of_base
    assert all(tokens != other for tokens, other in zip(expected, of_base, strict=True))
