"""Admission of a family: greedy tokens of a mixed, chunked schedule equal Transformers' own `generate`."""

import pytest
import torch
from torch import nn

from server.model.attention import PROBE
from server.model.families import FAMILIES, UnsupportedModelError, check_family, max_model_len
from tests.engine_harness import Engine, generated, prompts
from tests.tiny_models import MODELS, make_config, make_model

NEW_TOKENS = 10


def reference(model: nn.Module, prompt: list[int], count: int = NEW_TOKENS) -> list[int]:
    with torch.inference_mode():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return ids[0, len(prompt) :].tolist()


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
    assert [generated(request) for request in engine.requests] == expected


def test_long_rope_beyond_the_original_length_equals_generate_of_a_long_request() -> None:
    long_prompt = prompts(longest=80)[1]
    assert len(long_prompt) == 80
    expected = reference(make_model("phi3-longrope"), long_prompt)
    engine = Engine(make_model("phi3-longrope", attention=PROBE), max_model_len=128)
    engine.add(prompts()[0], NEW_TOKENS)  # a short one beside it must not change its frequencies
    request = engine.add(long_prompt, NEW_TOKENS)
    engine.run()
    assert generated(request) == expected


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
