"""A decode step can be captured in a CUDA graph: traced on a device without memory, it neither reads back nor waits.

Tensors of torch's meta device have shapes and no contents, so whatever depends on contents (a read-back, a shape)
raises. They stand for the GPU's: a tensor that is made anywhere else would be a copy between host and device.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.launches import BASE, EVERYTHING, META, ROWS, Watch, step_of
from kernels.compiled import everywhere
from kernels.compiled.launch import traced
from server.model.latent_attention import OwnLatentAttention
from server.model.probe import PROBE
from server.model.unlisted import list_unlisted
from tests.support.thirds import a_third
from tests.support.tiny_models import MODELS, make_config


@pytest.mark.parametrize("with_adapters", [False, True], ids=["base only", "adapters"])
@pytest.mark.parametrize("name", a_third(MODELS, always_too=("llama", "deepseek_v2", "gpt_oss")))
def test_a_decode_step_can_be_captured(name: str, with_adapters: bool) -> None:
    list_unlisted()
    config = make_config(name)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PROBE, dtype=torch.bfloat16).eval()
    compute, injected = step_of(model, EVERYTHING if with_adapters else BASE)
    with everywhere(), traced(), torch.inference_mode(), META, Watch() as watch:
        logits = compute()
    assert logits.shape == (ROWS, config.vocab_size) and logits.device == META
    assert not watch.elsewhere
    assert any("heddle::paged_attention" in op for op in watch.launched)
    assert any("heddle::lora" in op for op in watch.launched) == with_adapters
    assert any("heddle::expert_route" in op for op in watch.launched) == bool(injected.experts)
    assert any("heddle::expert_lora" in op for op in watch.launched) == (with_adapters and bool(injected.experts))
    has_own_forward = any(isinstance(it.__dict__.get("forward"), OwnLatentAttention) for it in model.modules())
    assert any("heddle::latent_prep" in op for op in watch.launched) == has_own_forward
    assert has_own_forward or name != "deepseek_v2"
