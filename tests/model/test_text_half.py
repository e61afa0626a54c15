"""The text half of multimodal checkpoints, against the whole model of Transformers on prompts of text alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig

from server.model.families import FAMILIES, UnsupportedModelError, stop_token_ids
from server.model.loader import load_model, load_weights
from server.model.text_half import PARTS, REFUSED, text_half, type_of
from tests.support.engine_harness import Engine, prompts
from tests.support.tiny_models import NEW_TOKENS, reference
from tests.support.tiny_multimodal import WHOLES, make_config, make_multimodal, save

# text halves of other families than a type's first one
_OTHERS = [("llava", "qwen2"), ("llava", "mistral"), ("llava", "mixtral"), ("llava", "phi3"), ("llava", "gemma2"),
           ("llava_next", "llama"), ("llava_onevision", "qwen3"), ("internvl", "qwen3"),
           ("internvl", "llama")]  # fmt: skip
_IN_CI = {"llava", "qwen2_vl", "qwen3_vl_moe"}


def _loaded(directory: Path) -> Any:
    """By its own loader, served or not, to be called as it is."""
    half = text_half(AutoConfig.from_pretrained(directory))
    assert half is not None
    model: Any = load_weights(directory, half, torch.float32, lambda *_: None)
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"
    return model


def _logits(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        tokens = torch.tensor([prompt])
        logits: torch.Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0]
    return logits


def _forgotten_scale(config: Any) -> float:
    """What the plain model multiplies logits by, and Transformers' whole one does not (nor did the first of these)."""
    if config.model_type == "cohere2":
        return float(config.logit_scale)
    return 1 / config.logits_scaling if config.text_half_of.startswith("granite_speech") else 1.0


def _cases() -> list[Any]:
    pairs = [*WHOLES.items(), *_OTHERS]
    return [
        pytest.param(whole, text, id=f"{whole}-{text}", marks=[] if whole in _IN_CI and (whole, text) in WHOLES.items()
                     else pytest.mark.thorough)
        for whole, text in pairs
    ]  # fmt: skip


def test_every_half_has_a_model_here() -> None:
    assert {*WHOLES, "qwen2_5_omni", "qwen3_omni_moe"} == PARTS.keys()
    assert not PARTS.keys() & REFUSED.keys()


@pytest.mark.parametrize("published", [True, False], ids=["published", "renamed"])
@pytest.mark.parametrize(("whole", "text"), _cases())
def test_logits_equal_the_whole_models(tmp_path: Path, whole: str, text: str, published: bool) -> None:
    if whole == "ernie4_5_vl_moe" and not published:
        pytest.skip("its checkpoints have the published names, whoever saves them")
    model = make_multimodal(whole, text)
    save(tmp_path, model, published)
    plain = _loaded(tmp_path)
    for prompt in prompts()[:2]:
        expected = _logits(model, prompt)
        assert expected.std() > 0.3
        torch.testing.assert_close(
            _logits(plain, prompt), expected * _forgotten_scale(plain.config), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(("whole", "text"), _cases())
def test_tokens_equal_generate_of_the_whole(tmp_path: Path, whole: str, text: str) -> None:
    half = text_half(make_config(whole, text))
    assert half is not None
    if half.config.model_type not in FAMILIES:
        pytest.skip(f"{half.config.model_type} is not served")
    model = make_multimodal(whole, text)
    save(tmp_path, model, published=True)
    expected = [reference(model, prompt) for prompt in prompts()]
    assert len({tuple(tokens) for tokens in expected}) > 2
    plain, _ = load_model(tmp_path, torch.float32, lambda *_: None)
    engine = Engine(plain)
    for prompt in prompts():
        engine.add(prompt, NEW_TOKENS)
    engine.run()
    assert [request.tokens for request in engine.answers.values()] == expected
    assert engine.assembly.info.model_type == f"{half.config.model_type}, the text half of {whole}"


# -- names ---


def _rename(change: Callable[[str], str]) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {change(key): tensor for key, tensor in tensors.items()}


def _turn_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As Qwen published them."""
    return {key: it.transpose(1, 2).contiguous() if ".mlp.experts." in key else it for key, it in tensors.items()}


OTHER_NAMES = {
    "without a base": ("llava", _rename(lambda key: key.removeprefix("model."))),
    "as an early Qwen2-VL": ("qwen2_vl", _rename(lambda key: key.replace("model.language_model.", "model."))),
    "an inner model": ("qwen3_vl", _rename(lambda key: key.replace("language_model.", "language_model.model."))),
    "two inner models": ("qwen2_audio", _rename(lambda key: key.replace("model.language_model.",
                                                                        "language_model.model.model."))),
    "a head inside": ("llava", _rename(lambda key: key.replace("lm_head", "language_model.lm_head"))),
    "experts that are turned": ("qwen3_vl_moe", _turn_experts),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [it if it in ("a head inside", "experts that are turned") else pytest.param(it, marks=pytest.mark.thorough)
             for it in OTHER_NAMES]
)  # fmt: skip
def test_other_names_and_forms_are_read(tmp_path: Path, case: str) -> None:
    whole, change = OTHER_NAMES[case]
    model = make_multimodal(whole)
    tensors = save(tmp_path, model, published=False)
    changed = change(tensors)
    assert changed.keys() != tensors.keys() or any(changed[key].shape != tensors[key].shape for key in changed)
    save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
    plain = _loaded(tmp_path)
    torch.testing.assert_close(_logits(plain, prompts()[1]), _logits(model, prompts()[1]), atol=1e-5, rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("whole", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_the_thinker_of_an_omni_model_is_read(tmp_path: Path, whole: str) -> None:
    model = make_multimodal(f"{whole}_thinker")
    thinker = save(tmp_path, model, published=True)
    CONFIG_MAPPING[whole](thinker_config=model.config.to_dict()).save_pretrained(tmp_path)
    others = {"talker.model.layers.0.mlp.up_proj.weight": torch.zeros(1), "token2wav.x": torch.zeros(1)}
    tensors = {f"thinker.{key}": it for key, it in thinker.items()} | others
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    plain = _loaded(tmp_path)
    torch.testing.assert_close(_logits(plain, prompts()[1]), _logits(model, prompts()[1]), atol=1e-5, rtol=1e-5)


def test_shards_are_read(tmp_path: Path) -> None:
    model = make_multimodal("llava")
    tensors = save(tmp_path, model, published=True)
    (tmp_path / "model.safetensors").unlink()
    names = {}
    for number, keys in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"model-{number}.safetensors"
        save_file({key: tensors[key] for key in keys}, tmp_path / file, {"format": "pt"})
        names |= dict.fromkeys(keys, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    plain = _loaded(tmp_path)
    torch.testing.assert_close(_logits(plain, prompts()[1]), _logits(model, prompts()[1]), atol=1e-5, rtol=1e-5)


# -- what is not the half's, or is not all of it ---

KEY = "language_model.model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda it: it.pop(KEY), r"lacks 1 tensor: model\.layers\.0\.self_attn\.q_proj\.weight"),
        (lambda it: it.update({KEY.replace("weight", "bias"): torch.zeros(64)}),
         r"beyond what the model takes 1 tensor: model\.layers\.0\.self_attn\.q_proj\.bias"),
        (lambda it: it.update({"talker.weight": torch.zeros(1)}), r"takes 1 tensor: talker\.weight"),
        (lambda it: it.update({"model.audio_tower.weight": torch.zeros(1)}), r"takes 1 tensor: model\.audio_tower"),
        (lambda it: it.update({KEY: torch.zeros(32, 64)}), r"in another shape 1 tensor: .*q_proj\.weight"),
        (lambda it: it.update({KEY.replace("language_model.model", "model"): torch.zeros(64, 64)}),
         r"two tensors for model\.layers\.0\.self_attn\.q_proj\.weight; one of them is"),
    ],
)  # fmt: skip
def test_missing_and_stray_tensors_are_refused(tmp_path: Path, change: Any, says: str) -> None:
    tensors = save(tmp_path, make_multimodal("llava", num_hidden_layers=1), published=True)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=says):
        _loaded(tmp_path)


def test_a_checkpoint_without_safetensors_is_refused(tmp_path: Path) -> None:
    save(tmp_path, make_multimodal("llava", num_hidden_layers=1), published=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    with pytest.raises(UnsupportedModelError, match=r"holds no model\.safetensors"):
        _loaded(tmp_path)


def test_experts_that_could_be_turned_either_way_are_refused(tmp_path: Path) -> None:
    save(tmp_path, make_multimodal("qwen3_vl_moe", moe_intermediate_size=32, num_hidden_layers=1), published=True)
    with pytest.raises(UnsupportedModelError, match="gate_up_proj is square"):
        _loaded(tmp_path)


@pytest.mark.parametrize(
    ("whole", "says"),
    [
        ("mllama", "'mllama' is not served, nor its text half alone: its text layers read images"),
        ("paligemma", "reads a whole prompt at once"),
        ("idefics", "cross-attention"),
        ("voxtral_realtime", "delay of the sound"),
        ("florence2", "model type 'florence2' is not served"),
    ],
)
def test_what_is_no_plain_half_is_refused_by_name(tmp_path: Path, whole: str, says: str) -> None:
    CONFIG_MAPPING[whole]().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=says):
        load_model(tmp_path, torch.float32, lambda *_: None)


def test_quantised_wholes_are_refused(tmp_path: Path) -> None:
    config = make_config("llava")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="quantised"):
        load_model(tmp_path, torch.float32, lambda *_: None)


# -- configurations ---


def _half_of(directory: Path, config: dict[str, Any]) -> Any:
    (directory / "config.json").write_text(json.dumps(config))
    half = text_half(AutoConfig.from_pretrained(directory))
    assert half is not None
    return half.config


def test_a_text_half_of_no_type_is_the_types_own(tmp_path: Path) -> None:
    config = _half_of(tmp_path, {"model_type": "llava", "text_config": {"hidden_size": 64}})
    assert config.model_type == "llama" and config.hidden_size == 64
    assert type_of(config) == "llama, the text half of llava"


def test_a_configuration_without_a_half_of_its_own_is_read(tmp_path: Path) -> None:
    """As Qwen2-VL was published."""
    config = _half_of(tmp_path, {
        "model_type": "qwen2_vl", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "tie_word_embeddings": True, "eos_token_id": 7, "vision_config": {"depth": 1}, "sliding_window": 32,
        "use_sliding_window": False, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    })  # fmt: skip
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("qwen2", 64, 2)
    assert config.tie_word_embeddings and config.eos_token_id == 7 and config.sliding_window is None
    assert config.rope_parameters["rope_type"] == "default" and "mrope_section" not in config.rope_parameters


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [({"eos_token_id": 5}, {"eos_token_id": 6}, {5}), ({}, {"eos_token_id": [6, 7]}, {6, 7}), ({}, {}, {2})],
)
def test_ends_of_sequence_are_those_of_the_whole(
    tmp_path: Path, outer: dict[str, Any], inner: dict[str, Any], expected: set[int]
) -> None:
    """What Transformers' generation takes where there is no generation_config.json."""
    config = _half_of(tmp_path, {"model_type": "llava", "text_config": {"model_type": "llama", **inner}, **outer})
    assert stop_token_ids(config, None) == expected


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_where_the_whole_ties_it(tmp_path: Path, tied: bool) -> None:
    model = make_multimodal("qwen3_vl", tied=tied, num_hidden_layers=1)
    tensors = save(tmp_path, model, published=True)
    assert ("lm_head.weight" in tensors) != tied
    plain = _loaded(tmp_path)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    torch.testing.assert_close(_logits(plain, prompts()[1]), _logits(model, prompts()[1]), atol=1e-5, rtol=1e-5)


def test_the_dtype_is_the_one_asked_for(tmp_path: Path) -> None:
    save(tmp_path, make_multimodal("llava", num_hidden_layers=1), published=True)
    model, generation = load_model(tmp_path, torch.bfloat16, lambda *_: None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and generation is None
    assert isinstance(model, nn.Module) and not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("rope", [
    {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "default", "rope_theta": 1e6},
])  # fmt: skip
@pytest.mark.parametrize("whole", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.thorough
def test_scaled_ropes_stay_what_they_are(tmp_path: Path, whole: str, rope: dict[str, Any]) -> None:
    model = make_multimodal(whole, rope_parameters={**rope, "mrope_section": [2, 3, 3]})
    save(tmp_path, model, published=True)
    plain = _loaded(tmp_path)
    for prompt in prompts(longest=80)[:2]:
        torch.testing.assert_close(_logits(plain, prompt), _logits(model, prompt), atol=1e-5, rtol=1e-5)
