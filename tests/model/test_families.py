"""Admission of a family: greedy tokens of a mixed, chunked schedule equal Transformers' own `generate`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.model.families import FAMILIES, UnsupportedModelError, check_family, max_model_len
from server.model.loader import load_model
from server.model.probe import PROBE
from tests.support.engine_harness import Engine, prompts
from tests.support.tiny_models import MODELS, NEW_TOKENS, make_config, make_model, reference, save_model


def test_every_family_has_a_model_here() -> None:
    assert {model_type for model_type, _ in MODELS.values()} == FAMILIES


@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_generate(name: str) -> None:
    stock = make_model(name)
    expected = [reference(stock, prompt) for prompt in prompts()]
    assert len({tuple(tokens) for tokens in expected}) == 5 and len(set(expected[1])) > 2  # the model says something
    engine = Engine(make_model(name, attention=PROBE))
    arriving = iter(prompts())

    def arrive(step: int) -> None:
        if step % 2 == 0 and (prompt := next(arriving, None)) is not None:
            engine.add(prompt, NEW_TOKENS)

    engine.run(between=arrive)
    assert [request.tokens for request in engine.answers.values()] == expected


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
    [("llama", 0, 512), ("llama", 100, 100), ("phi3-longrope", 0, 64), ("phi3-longrope", 128, 128)],
)
def test_max_model_len(name: str, asked: int, expected: int) -> None:
    assert max_model_len(make_config(name), asked) == expected


@pytest.mark.parametrize(("name", "asked"), [("llama", 513), ("llama-dynamic", 65)])
def test_lengths_beyond_the_model_are_refused_with_the_numbers(name: str, asked: int) -> None:
    with pytest.raises(UnsupportedModelError, match=str(asked)):
        max_model_len(make_config(name), asked)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("llama", {"sliding_window": 7}, "sliding_window = 7 has no effect"),
        ("deepseek_v2", {"sliding_window": 7}, "sliding_window = 7 has no effect"),
        ("llama", {"is_causal": False}, "is_causal"),
        ("llama", {"attention_chunk_size": 8}, "attention_chunk_size"),
        ("mistral-window", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "both full and sliding"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_settings_that_would_be_computed_otherwise_are_refused(
    name: str, changes: dict[str, object], says: str
) -> None:
    config = make_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(UnsupportedModelError, match=says):
        check_family(config)


def test_a_checkpoint_with_missing_or_stray_tensors_is_refused(tmp_path: Path) -> None:
    directory = save_model(tmp_path / "model", "llama")
    file = directory / "model.safetensors"
    whole = load_file(file)
    load_model(directory, torch.float32, lambda *_: None)  # as it is it loads
    for changed, says in (
        ({key: value for key, value in whole.items() if key != "lm_head.weight"}, "lacks 1 tensors: lm_head.weight"),
        (whole | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, "beyond what the model takes 1 tensors"),
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(UnsupportedModelError, match=says):
            load_model(directory, torch.float32, lambda *_: None)


def test_recurrent_hybrids_are_refused_by_name() -> None:
    from transformers import CONFIG_MAPPING

    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        check_family(CONFIG_MAPPING["qwen3_next"]())
    with pytest.raises(UnsupportedModelError, match="mamba"):
        check_family(CONFIG_MAPPING["mamba"]())
    chunked = make_config("llama")
    chunked.layer_types = ["chunked_attention"] * 4
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        check_family(chunked)
