"""Who sees whom in each layer is learnt from the masks that Transformers would have built."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from server.model.families import UnsupportedModelError
from server.model.masks import LayerMask, MaskFunction, UnknownMaskError, Visible
from server.model.probe import PROBE, probe
from tests.support.tiny_models import make_config

CPU = torch.device("cpu")
LENGTH = 512


def window(size: int) -> MaskFunction:
    return sliding_window_causal_mask_function(size)


def chunks(size: int) -> MaskFunction:
    return chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 15, 16, 17, 64, 65])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 16, 63, 64, 65, 100])
def test_windows_and_chunks_are_told_apart(size: int, length: int) -> None:
    """Where both hide the same, either name is right."""
    for function in (window(size), chunks(size), causal_mask_function):
        mask = LayerMask(function, CPU)
        found = mask.visible(length)
        assert [found.first_key(q) for q in range(length)] == [
            int(mask.seen(q, range(length)).int().argmax()) for q in range(length)
        ]
        assert (found == Visible()) == (function is causal_mask_function or size >= length)


@pytest.mark.parametrize("first", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_keys_are_asked_for_in_pieces(first: int) -> None:
    length = (1 << 20) + 5
    assert LayerMask(window(length - first), CPU).visible(length) == Visible(window=length - first)


def holes(_batch: object, _head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (query - key) % 3 == 0


def before(_batch: object, _head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key < query  # not itself


def grown(_batch: object, _head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return key > query // 2  # a window that grows


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (bidirectional_mask_function, "position 0 sees one after it, at 63"),
        (and_masks(causal_mask_function, holes), "sees 22 tokens between 0 and 63, which are no run"),
        (before, "which are no run"),
        (and_masks(causal_mask_function, grown), "the token at position"),
    ],
)
def test_anything_else_is_told_of_with_the_numbers(function: MaskFunction, says: str) -> None:
    with pytest.raises(UnknownMaskError, match=says):
        LayerMask(function, CPU).visible(64)


def probed(model_type: str, **settings: Any) -> list[Visible]:
    base = make_config("llama").to_dict()
    common = {key: base[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                                         "num_key_value_heads", "max_position_embeddings", "pad_token_id")}  # fmt: skip
    config = CONFIG_MAPPING[model_type](**{"num_hidden_layers": 4, "sliding_window": 7, **common, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PROBE, dtype=torch.float32).eval()
    return [it.visible for it in probe(model, LENGTH).attention]


FULL, SEVEN = Visible(), Visible(window=7)


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("llama", {"sliding_window": None}, [FULL] * 4),
        ("mistral", {}, [SEVEN] * 4),
        ("mistral", {"sliding_window": LENGTH}, [FULL] * 4),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, [FULL, FULL, SEVEN, SEVEN]),
        ("gemma2", {"head_dim": 16}, [SEVEN, FULL] * 2),
        ("llama4_text", {"attention_chunk_size": 16, "moe_layers": [], "intermediate_size_mlp": 96, "head_dim": 16},
         [Visible(chunk=16)] * 3 + [FULL]),
    ],
)  # fmt: skip
def test_each_layer_of_a_model(model_type: str, settings: dict[str, Any], expected: list[Visible]) -> None:
    assert probed(model_type, **settings) == expected


def test_a_window_that_its_family_does_not_know_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="sliding_window = 7 has no effect in llama models"):
        probed("llama")


def test_layers_that_see_what_is_to_come_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="llama: attention of layer 0 .* sees one after it, at 511"):
        probed("llama", is_causal=False)


def test_layers_without_attention_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="of 4 layers 1 call attention once"):
        probed("qwen3_next", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def test_a_mask_of_its_familys_making_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="doge: attention of layer 0 .* of its family's making"):
        probed("doge", sliding_window=None)
