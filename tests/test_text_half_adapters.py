"""Adapters that PEFT trained on a whole multimodal model, served on its text half."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.errors import AdapterError
from server.model.families import FAMILIES
from server.model.loader import load_model
from server.model.text_half import text_half
from tests.support.engine_harness import Engine, prompts
from tests.support.tiny_adapters import register
from tests.support.tiny_models import NEW_TOKENS, reference
from tests.support.tiny_multimodal import TOWERS, make_config, make_with_towers

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = {"old": "language_model.model.layers", "new": "model.language_model.layers"}


def _trained(whole: str, images: bool, **config: Any) -> Any:
    """Every linear of a name is adapted, as most trainers do it, those of a tower too; B of the tower's is zero as it
    began, or not."""
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=LINEARS, task_type="CAUSAL_LM", **config)
    wrapped = peft.get_peft_model(make_with_towers(whole), settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(wrapped.named_parameters()):
            if ".lora_B." in name and (images or ".language_model." in name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return wrapped


def _engine(directory: Path, whole: str) -> Engine:
    make_with_towers(whole).save_pretrained(directory)
    model, _ = load_model(directory, torch.float32, lambda *_: None)
    return Engine(model)


def _served() -> list[Any]:
    halves = {whole: text_half(make_config(whole)) for whole in TOWERS}
    names = [whole for whole, half in halves.items() if half is not None and half.config.model_type in FAMILIES]
    return [
        pytest.param(name, spelling, marks=[] if (name, spelling) == ("llava", "new") else pytest.mark.thorough)
        for name in names
        for spelling in LAYERS
    ]


@pytest.mark.parametrize(("whole", "spelling"), _served())
def test_tokens_equal_pefts(tmp_path: Path, whole: str, spelling: str) -> None:
    wrapped = _trained(whole, images=False)
    expected = [reference(wrapped, prompt) for prompt in prompts()]
    assert expected != [reference(make_with_towers(whole), prompt) for prompt in prompts()]
    wrapped.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {key.replace(LAYERS["new"], LAYERS[spelling]): it for key, it in load_file(file).items()}
    assert any(key.startswith(f"base_model.model.{LAYERS[spelling]}.0.") for key in tensors)
    save_file(tensors, file, {"format": "pt"})
    engine = _engine(tmp_path / "base", whole)
    ref = register(engine, tmp_path / "adapter").ref
    for prompt in prompts():
        engine.add(prompt, NEW_TOKENS, adapter=ref)
    engine.run()
    assert [request.tokens for request in engine.answers.values()] == expected


@pytest.mark.parametrize("whole", ["llava", pytest.param("mistral3", marks=pytest.mark.thorough)])
def test_an_adapter_that_learnt_of_images_is_refused(tmp_path: Path, whole: str) -> None:
    """Its text layers were trained to read what the trained tower says."""
    _trained(whole, images=True).save_pretrained(tmp_path / "adapter")
    engine = _engine(tmp_path / "base", whole)
    with pytest.raises(AdapterError, match="vision_tower.* acts on a part that is not served .* and is not zero"):
        register(engine, tmp_path / "adapter")
