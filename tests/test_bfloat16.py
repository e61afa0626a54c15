"""bfloat16 on a CPU: the engine's tokens against Transformers' on the same weights, rounded to bfloat16 too.

Both round at each of thousands of products, in another order, so no two of them have the same logits. What can be held:
where the engine's token is not Transformers', that one's logits of the two are within rounding. Each is asked about the
engine's own text so far, so that one early difference does not count for all that follows.
"""

import pytest
import torch
from torch import nn

from server.model.probe import PROBE
from tests.support.engine_harness import Engine, prompts
from tests.support.tiny_models import make_model

NEW_TOKENS = 12
# of the largest logit: eight steps of bfloat16's 2**-8. A mixture's router is float32 here and bfloat16 there: where
# two experts are nearly as good, another one is chosen, which is four times as much
TOLERANCE = {"llama": 2**-5, "gemma2": 2**-5, "qwen3_moe": 2**-3, "deepseek_v2": 2**-3}


@torch.inference_mode()
def logits_of(model: nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """[tokens, V] float32: what each of the tokens was chosen from."""
    out: torch.Tensor = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    return out


@pytest.mark.parametrize("form", ["torch", "onednn", "onednn-packed"])
@pytest.mark.parametrize("name", TOLERANCE)
def test_tokens_are_those_of_transformers_within_rounding(name: str, form: str) -> None:
    engine = Engine(make_model(name, attention=PROBE).to(torch.bfloat16), linear_form=form)
    assert engine.assembly.info.dtype == "bfloat16"
    asked = [engine.add(prompt, NEW_TOKENS) for prompt in prompts(10)]
    engine.run()
    model = make_model(name).to(torch.bfloat16)
    same = 0
    for answer in asked:
        logits = logits_of(model, answer.prompt, answer.tokens)
        of_answer = logits.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        assert bool((logits.amax(1) - of_answer <= TOLERANCE[name] * logits.abs().amax(1)).all())
        same += int((logits.argmax(1) == torch.tensor(answer.tokens)).sum())
    assert same >= 0.9 * NEW_TOKENS * len(asked)
