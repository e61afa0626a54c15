"""How many launches a layer of a decode takes, by what is dispatched (benchmarks/launches.py)."""

import pytest

from benchmarks.launches import BASE, ESFT, LORA, ShapeKey, config_of, count_layer


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_dense_layer(name: str) -> None:
    base, with_lora = (count_layer(config_of(name), shape) for shape in (BASE, LORA))
    assert base.total <= 9 and base.on_branch == 0, base
    assert with_lora.total <= 13 and with_lora.on_critical_path <= 9, with_lora


@pytest.mark.parametrize("shape", [BASE, ESFT], ids=["base", "esft"])
def test_a_mixture_with_shared_experts(shape: ShapeKey) -> None:
    """Its router and its shared experts take no launch of their own, nor do its latents' parts."""
    launches = count_layer(config_of("deepseek_v2"), shape)
    assert launches.total <= 14, launches
    by_name = launches.by_name
    experts = {name: count for name, count in by_name.items() if "expert" in name}
    ops = ("expert_route_of", "expert_gate_up", "expert_down", "expert_combine")
    assert experts == dict.fromkeys([f"heddle::{op}" for op in ops], 1)
    assert not any(activation in by_name for activation in ("heddle::gated", "aten::silu"))
