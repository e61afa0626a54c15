"""Admission of a family: greedy tokens of a mixed, chunked schedule equal Transformers' own `generate`."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from server.model.families import FAMILIES, UnsupportedModelError, check_family, max_model_len
from server.model.loader import load_model
from server.model.probe import PROBE
from server.model.refused import REFUSED, reason_against
from tests.families.__main__ import PAGE
from tests.families.measure import arrive_in_turn, greedy, measure
from tests.families.names import KNOWN_AS
from tests.support.engine_harness import Engine, prompts
from tests.support.thirds import a_third
from tests.support.tiny_models import MODELS, NEW_TOKENS, make_config, make_model, reference, save_model


def test_every_family_has_a_model_here() -> None:
    assert {model_type for model_type, _ in MODELS.values()} == FAMILIES


@pytest.mark.parametrize("name", a_third(MODELS, always_too=("llama", "deepseek_v2", "gpt_oss", "gemma4_text-moe")))
def test_tokens_equal_generate(name: str) -> None:
    expected = greedy(make_model(name), prompts())
    assert len({tuple(tokens) for tokens in expected}) == 5 and len(set(expected[1])) > 2  # the model says something
    engine = Engine(make_model(name, attention=PROBE), self_check=True)
    assert engine.assembly.info.self_checked is not None
    assert arrive_in_turn(engine) == expected


@pytest.mark.thorough
@pytest.mark.parametrize("name", MODELS)
def test_with_adapters_on_all_that_takes_them_tokens_equal_those_of_merged_weights(name: str, tmp_path: Path) -> None:
    measured = measure(name, tmp_path)
    assert measured.is_exact, measured


def test_the_page_tells_of_every_family() -> None:
    measured = PAGE.read_text().partition("## Text halves")[0]
    told = set(re.findall(r"^\| `([\w-]+)`", measured, re.MULTILINE))
    assert told == set(MODELS), "run make families"
    assert set(KNOWN_AS) == FAMILIES


@pytest.mark.parametrize("name", ["llama", "minimax_m2"])
def test_a_window_that_the_forward_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="sliding_window = 7 has no effect"):
        Engine(make_model(name, attention=PROBE, sliding_window=7))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 8}),
        ("gpt_oss", {"num_local_experts": 1, "num_experts_per_tok": 1}),
        ("gemma4_text-moe", {"top_k_experts": 8}),
        ("glm4_moe", {"n_shared_experts": 0}),
        ("granitemoe", {"output_router_logits": True}),
    ],
)
def test_at_the_edges_of_what_a_configuration_may_say(name: str, changes: dict[str, Any]) -> None:
    """Every expert chosen, shared experts of no width, more asked of the forward than logits."""
    expected = greedy(make_model(name, **changes), prompts())
    assert arrive_in_turn(Engine(make_model(name, attention=PROBE, **changes), self_check=True)) == expected


def test_long_rope_beyond_the_original_length_equals_generate_of_a_long_request() -> None:
    long_prompt = prompts(longest=80)[1]
    assert len(long_prompt) == 80
    expected = reference(make_model("phi3-longrope"), long_prompt)
    engine = Engine(make_model("phi3-longrope", attention=PROBE), max_model_len=128)
    engine.add(prompts()[0], NEW_TOKENS)  # a short one beside it must not change its frequencies
    request = engine.add(long_prompt, NEW_TOKENS)
    engine.run()
    assert request.tokens == expected


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("llama", 0, 512),
        ("llama", 100, 100),
        ("phi3-longrope", 0, 64),
        ("phi3-longrope", 128, 128),
        ("deepseek_v32", 0, 43),
    ],  # the longest of prompts, and what is generated
)
def test_max_model_len(name: str, asked: int, expected: int) -> None:
    assert max_model_len(make_config(name), asked) == expected


@pytest.mark.parametrize(("name", "asked"), [("llama", 513), ("llama-dynamic", 65), ("glm_moe_dsa", 44)])
def test_lengths_beyond_the_model_are_refused_with_the_numbers(name: str, asked: int) -> None:
    with pytest.raises(UnsupportedModelError, match=str(asked)):
        max_model_len(make_config(name), asked)


def test_quantised_checkpoints_are_refused() -> None:
    config = make_config("llama")
    config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(UnsupportedModelError, match="quantised"):
        check_family(config)


def test_a_checkpoint_with_missing_or_stray_tensors_is_refused(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "llama")
    file = directory / "model.safetensors"
    whole = load_file(file)
    load_model(directory, torch.float32, lambda *_: None)  # as it is it loads
    for changed, says in (
        ({key: value for key, value in whole.items() if key != "lm_head.weight"}, "lacks 1 tensor: lm_head.weight"),
        (whole | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, "beyond what the model takes 1 tensor: "),
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(UnsupportedModelError, match=says):
            load_model(directory, torch.float32, lambda *_: None)


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        (
            "qwen3_next",
            "layer 0 of 48 is linear_attention, which is recurrent: three of four layers are gated",
        ),
        ("granitemoehybrid", "layer 0 of 32 is linear_attention, which is recurrent: each sequence would need a state"),
        ("falcon_h1", "layer 0 of 32 is hybrid, .* Mamba-2 runs beside attention"),
        ("mamba", "its layers are Mamba"),
        ("deepseek_v4", "layer 0 of .* attends to compressed keys"),
        ("gptj", "does not call Transformers' attention interface"),
        ("bloom", "ALiBi"),
        ("bert", "model type 'bert' is not served; .*docs/models.md lists all"),
    ],
)
def test_what_is_not_served_is_refused_with_the_reason(model_type: str, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        check_family(CONFIG_MAPPING[model_type]())


def test_every_refusal_is_of_a_type_that_is_there_and_not_served() -> None:
    assert set(REFUSED) <= set(CONFIG_MAPPING) - FAMILIES


def test_kinds_of_layers_are_not_believed_alone() -> None:
    """What Falcon-H1's layers are is not said by every version of its configuration."""
    told = reason_against("falcon_h1", ["full_attention"], {"full_attention"})
    assert told is not None and told.startswith("Mamba-2 runs beside attention")
    config = make_config("llama")
    config.layer_types = ["full_attention", "strange", "full_attention", "strange"]
    with pytest.raises(UnsupportedModelError, match="layer 1 of 4 is strange: only attention that is full"):
        check_family(config)
