"""Mixtures whose blocks Transformers computes in a way of its own: adapters act in them as in any other's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from server.model.families import UnsupportedModelError, check_family
from server.model.probe import PROBE
from tests.support.engine_harness import Engine
from tests.support.peft_merged import assert_served_as_merged, save_peft
from tests.support.tiny_models import make_config, make_model

EVERYWHERE = ["q_proj", "v_proj", "o_proj", "gate_proj"]
EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", "feed_forward.router.weight"]
TUNED = {0: [5, 2], 3: [0, 1, 7]}


def save_tuned(directory: Path, name: str) -> nn.Module:
    """DBRX's experts, tuned, in ESFT's format; and the model with them."""
    model, tensors = make_model(name), {}
    generator = torch.Generator().manual_seed(2)
    for layer, experts in TUNED.items():
        held = model.get_submodule(f"transformer.blocks.{layer}.ffn.experts.mlp")
        for expert in experts:
            for key, matrix in (("gate_proj", "w1"), ("up_proj", "v1"), ("down_proj", "w2")):
                weight = getattr(held, matrix).data.view(8, 48, 64)[expert]
                weight += torch.randn(weight.shape, generator=generator) * weight.std()
                stored = weight.T if matrix == "w2" else weight
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{key}.weight"] = stored.contiguous()
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "expert_cfg.json").write_text(json.dumps({"experts": {str(it): TUNED[it] for it in TUNED}}))
    return model


@pytest.mark.parametrize("name", ["llama4_text", "dbrx", "dbrx-esft"])
def test_adapters_act_in_blocks_of_their_own_kind(name: str, tmp_path: Path) -> None:
    name, _, kind = name.partition("-")
    if kind:
        merged = save_tuned(tmp_path / "it", name)
    elif name == "dbrx":
        merged = save_peft(tmp_path / "it", name, target_modules="all-linear")
    else:
        merged = save_peft(tmp_path / "it", name, target_modules=EVERYWHERE, target_parameters=EXPERTS)
    assert_served_as_merged(name, tmp_path / "it", merged)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("llama4_text", {"num_experts_per_tok": 2}, "takes 2 experts, each of which reads it times its own score"),
        ("dbrx", {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 8, "moe_top_k": 2,
                                 "moe_normalize_expert_weights": 2.0}}, "DbrxFFN .* chooses in an unknown way"),
    ],
)  # fmt: skip
def test_blocks_that_compute_something_else_are_refused(name: str, changes: dict[str, object], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        Engine(make_model(name, attention=PROBE, **changes))


def test_a_rope_that_transformers_does_not_read_is_refused() -> None:
    """The published DBRX says its base in a place that Transformers ignores."""
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 500000}
    with pytest.raises(UnsupportedModelError, match=r"rope_theta = 500000, .* takes 10000\.0"):
        check_family(make_config("dbrx", attn_config=attention))
    rope = {"rope_type": "default", "rope_theta": 500000}
    check_family(make_config("dbrx", attn_config=attention, rope_parameters=rope))
