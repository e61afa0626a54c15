"""The oracle for tokens that a grammar constrains: Transformers, with the same masks, on merged weights.

Requests with and without grammars are decoded together, through the base and through adapters, and masks come late.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from server.engine.fake_masks import FakeMasks, is_allowed
from server.engine.request import OfPrompt
from server.model.probe import PROBE
from tests.support.engine_harness import GREEDY, Engine, prompts
from tests.support.tiny_adapters import ATTENTION, merge, register, save_esft, save_lora
from tests.support.tiny_models import make_model

NEW_TOKENS = 10
FAMILIES = ["llama", "qwen3_moe", *(pytest.param(it, marks=pytest.mark.thorough) for it in ("gemma2", "deepseek_v2"))]


class Follow(LogitsProcessor):
    def __init__(self, grammar: str, prompt_len: int) -> None:
        self._grammar, self._prompt_len = grammar, prompt_len

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = input_ids[0, self._prompt_len :].tolist()
        allowed = [is_allowed(self._grammar, tokens, token) for token in range(scores.shape[1])]
        return scores.masked_fill(~torch.tensor(allowed), -torch.inf)


@torch.inference_mode()
def alone(model: nn.Module, prompt: Sequence[int], grammar: str | None) -> list[int]:
    ids = torch.tensor([list(prompt)])
    processors = LogitsProcessorList([] if grammar is None else [Follow(grammar, len(prompt))])
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
        do_sample=False, logits_processor=processors, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("most_looks", [0, 5])
@pytest.mark.parametrize("name", FAMILIES)
def test_constrained_and_free_requests_mix(name: str, most_looks: int, tmp_path: Path) -> None:
    plain = make_model(name)
    masks = FakeMasks(plain.config.vocab_size, most_looks)
    engine = Engine(make_model(name, attention=PROBE), masks=masks)
    paths = [save_lora(tmp_path / "lora", plain, 1, ATTENTION, rank=6)]
    if name in ("qwen3_moe", "deepseek_v2"):
        paths.append(save_esft(tmp_path / "esft", plain, 3, {1: [5, 0, 3], 2: [7], 3: [2, 6]}))
    entries = [register(engine, path) for path in paths]
    models = {None: plain} | {entry.ref: merge(make_model(name), entry) for entry in entries}
    grammars = [None, "one", "two"]
    asked = []
    for index, prompt in enumerate(prompts(12, longest=30)):
        ref, grammar = list(models)[index % len(models)], grammars[index // len(models) % 3]
        told = OfPrompt(2) if index % 4 == 1 else None
        asked.append((engine.add(prompt, NEW_TOKENS, ref, GREEDY, of_prompt=told, grammar=grammar), grammar))
    engine.run()
    for answer, grammar in asked:
        assert answer.tokens == alone(models[answer.adapter], answer.prompt, grammar), answer.error
        assert (answer.told is None) is (answer.of_prompt is None)
    assert masks.num_open() == 0
