"""What is not recognised: families' modules with one thing more to them, which trying must show."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen3 import modeling_qwen3 as qwen

from server.model import shared_experts
from server.model.decoder_layers import DecoderLayer
from server.model.fused_attention import FusedAttention
from server.model.mlp import FusedGate
from server.model.probe import PROBE
from tests.support.engine_harness import Engine
from tests.support.stand_ins import SMALL
from tests.support.tiny_models import make_model

Forward = Callable[..., Any]


def doubled_input(forward: Forward) -> Forward:
    return lambda self, hidden_states, *others, **named: forward(self, hidden_states * 2, *others, **named)


def widened(forward: Forward) -> Forward:
    """What float32 cannot show."""
    return lambda self, hidden_states, *others, **named: forward(self, hidden_states.float(), *others, **named)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def doubled_queries(forward: Forward) -> Forward:
    """In front of their norm, which takes the factor out again, but for its epsilon."""

    def changed(self: Any, *arguments: Any, **named: Any) -> Any:
        before = self._modules
        self._modules = {**before, "q_norm": nn.Sequential(Double(), before["q_norm"])}
        try:
            return forward(self, *arguments, **named)
        finally:
            self._modules = before

    return changed


@pytest.mark.parametrize(
    ("name", "changed", "how", "ours"),
    [
        ("llama", llama.LlamaAttention, doubled_input, FusedAttention),
        ("llama", llama.LlamaMLP, doubled_input, FusedGate),
        ("llama", llama.LlamaDecoderLayer, widened, DecoderLayer),
        ("qwen3", qwen.Qwen3Attention, doubled_queries, FusedAttention),
    ],
)
def test_one_thing_more(
    name: str, changed: Any, how: Callable[[Forward], Forward], ours: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken() -> int:
        model = make_model(name, attention=PROBE, **SMALL)
        Engine(model)
        return sum(isinstance(it.__dict__.get("forward"), ours) for it in model.modules())

    assert taken() == SMALL["num_hidden_layers"]
    monkeypatch.setattr(changed, "forward", how(changed.forward))
    assert taken() == 0


def test_shared_experts_of_a_block_that_widens_its_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_model("deepseek_v2").get_submodule("model.layers.1.mlp")
    shared = next(it for it in block.children() if isinstance(it, deepseek.DeepseekV2MLP))
    width = shared.gate_proj.out_features // 2
    activation = shared_experts.activation_of_layer(shared)
    assert activation is not None

    def found() -> object:
        return shared_experts.shared_experts_of(block, "gate", "experts", width, activation)

    assert found() is not None
    monkeypatch.setattr(type(block), "forward", widened(type(block).forward))
    with torch.inference_mode():
        assert found() is None
