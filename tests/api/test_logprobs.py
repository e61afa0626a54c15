"""What is told of tokens, of the answer and of the prompt: against Transformers, through the openai client."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from adapters_store.rules import Rules
from tests.support.engine_harness import Engine
from tests.support.served import PROMPT, decode, stream_text, tiny
from tests.support.tiny_adapters import merge

pytestmark = pytest.mark.slow
MODELS = ("tiny", "lora", "esft")
TEXT = "how are you, all of you?"
Reference = Callable[[str, list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def reference(root: Path) -> Reference:
    """log-probabilities [T, V] of every place's next token, by Transformers with the adapter merged."""
    rules = Rules(Engine(tiny()).assembly.info.base, (root / "adapters",))
    models: dict[str, Any] = {"tiny": tiny()}
    for name in MODELS[1:]:
        models[name] = merge(tiny(), rules.read(name, str(root / "adapters" / name)))

    @torch.inference_mode()
    def logprobs(model: str, tokens: list[int]) -> torch.Tensor:
        logits = models[model](torch.tensor([tokens])).logits[0]
        return torch.Tensor(logits.float().log_softmax(-1))

    return logprobs


def greedy(reference: Reference, model: str, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference(model, tokens)[-1].argmax()))
    return tokens


@pytest.mark.parametrize("model", MODELS)
def test_log_probabilities_of_an_answer(client: openai.OpenAI, root: Path, reference: Reference, model: str) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3)
    tokens = greedy(reference, model, PROMPT, 8)
    expected, told = reference(model, tokens), answer.choices[0].logprobs
    assert told is not None and told.token_logprobs is not None and told.top_logprobs is not None
    for place, (logprob, top) in enumerate(zip(told.token_logprobs, told.top_logprobs, strict=True)):
        row = expected[len(PROMPT) + place - 1]
        assert logprob == pytest.approx(float(row[tokens[len(PROMPT) + place]]), abs=1e-4)
        assert sorted(top.values(), reverse=True) == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert list(top)[0] == told.tokens[place]  # type: ignore[index]
    assert answer.choices[0].text == decode(root, tokens[len(PROMPT) :])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_log_probabilities_of_an_echoed_prompt_as_harnesses_ask(
    client: openai.OpenAI, reference: Reference, model: str, max_tokens: int
) -> None:
    prompts = [PROMPT, PROMPT[:4], [7]]
    answer = client.completions.create(model=model, prompt=prompts, max_tokens=max_tokens, temperature=0, logprobs=1,
                                       echo=True)  # fmt: skip
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        told = choice.logprobs
        assert told is not None and told.token_logprobs is not None and told.tokens is not None
        assert len(told.token_logprobs) == len(told.tokens) == len(told.text_offset or ()) == len(prompt) + max_tokens
        assert told.token_logprobs[0] is None and told.top_logprobs is not None and told.top_logprobs[0] is None
        expected = reference(model, prompt)
        own = [float(expected[place, token]) for place, token in enumerate(prompt[1:])]
        assert told.token_logprobs[1 : len(prompt)] == pytest.approx(own, abs=1e-4)
        for place, top in enumerate(told.top_logprobs[1 : len(prompt)]):
            assert max(top.values()) == pytest.approx(float(expected[place].max()), abs=1e-4)
            is_greedy = int(expected[place].argmax()) == prompt[place + 1]
            assert (max(top, key=lambda text: top[text]) == told.tokens[place + 1]) == is_greedy


def test_a_prompt_is_told_again_after_it_was_cached(http: httpx.Client) -> None:
    """The prefix cache knows its keys and not its logits."""
    prompt = [(5 * i) % 256 for i in range(80)]
    body = {"model": "lora", "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    first, second = (http.post("/v1/completions", json=body).json() for _ in range(2))
    assert len(first["choices"][0]["logprobs"]["token_logprobs"]) == 81
    assert first["choices"] == second["choices"] and second["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    del body["logprobs"], body["echo"]
    assert http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 64


@pytest.mark.parametrize("n", [1, 2])
def test_prompt_logprobs_in_vllms_words(http: httpx.Client, reference: Reference, n: int) -> None:
    prompt = PROMPT
    body = {"model": "esft", "prompt": prompt, "max_tokens": 2, "prompt_logprobs": 2, "n": n}
    choices = http.post("/v1/completions", json=body).json()["choices"]
    expected = reference("esft", prompt)
    assert len(choices) == n
    for choice in choices:
        told = choice["prompt_logprobs"]
        assert told[0] is None and len(told) == len(prompt)
        for place, entries in enumerate(told[1:]):
            own, row = prompt[place + 1], expected[place]
            assert next(iter(entries)) == str(own) and 2 <= len(entries) <= 3
            assert entries[str(own)]["rank"] == int((row > row[own]).sum()) + 1
            for token, entry in entries.items():
                assert entry["logprob"] == pytest.approx(float(row[int(token)]), abs=1e-4)
                assert set(entry) == {"logprob", "rank", "decoded_token"}


def test_chat_tells_tokens_that_join_to_its_text(client: openai.OpenAI, http: httpx.Client) -> None:
    messages: Any = [{"role": "user", "content": TEXT}]
    options: dict[str, Any] = dict(model="lora", messages=messages, max_tokens=12, temperature=0, logprobs=True,
                                   top_logprobs=2)  # fmt: skip
    choice = client.chat.completions.create(**options).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    told = choice.logprobs.content
    raw = b"".join(bytes(it.bytes or ()) for it in told)
    assert len(told) == 12 and raw.decode(errors="replace") == choice.message.content
    assert all(it.top_logprobs[0].logprob == it.logprob and len(it.top_logprobs) == 2 for it in told)
    streamed = [
        it
        for chunk in client.chat.completions.create(**options, stream=True)
        for it in (chunk.choices[0].logprobs.content or () if chunk.choices[0].logprobs else ())
    ]
    assert [it.bytes for it in streamed] == [it.bytes for it in told]
    assert [it.logprob for it in streamed] == pytest.approx([it.logprob for it in told], abs=1e-4)
    tops = [[it.bytes for it in token.top_logprobs] for token in streamed]
    assert tops == [[it.bytes for it in token.top_logprobs] for token in told]
    whole = http.post("/v1/chat/completions", json=options | {"prompt_logprobs": 1}).json()
    assert len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]
    plain = http.post("/v1/chat/completions", json=options | {"logprobs": False, "top_logprobs": None}).json()
    assert plain["choices"][0]["logprobs"] is None and "prompt_logprobs" not in plain


@pytest.mark.parametrize("index", [0, 1, 3])
def test_streamed_completions_tell_what_whole_ones_do(http: httpx.Client, index: int) -> None:
    body = {"model": "lora", "prompt": [PROMPT, PROMPT[:5]], "max_tokens": 10, "temperature": 0, "logprobs": 2, "n": 2,
            "echo": True}  # fmt: skip
    whole = http.post("/v1/completions", json=body).json()["choices"][index]
    pieces = [event["choices"][0] for event in stream_text(http, **body)]
    pieces = [it for it in pieces if it["index"] == index]
    assert "".join(it["text"] for it in pieces) == whole["text"]
    streamed = {name: [it for piece in pieces for it in piece["logprobs"][name]] for name in whole["logprobs"]}
    for name in ("tokens", "text_offset"):
        assert streamed[name] == whole["logprobs"][name]
    assert streamed["token_logprobs"][0] is None
    assert streamed["token_logprobs"][1:] == pytest.approx(whole["logprobs"]["token_logprobs"][1:], abs=1e-4)
    assert [it and list(it) for it in streamed["top_logprobs"]] == [
        it and list(it) for it in whole["logprobs"]["top_logprobs"]
    ]


def test_log_probabilities_are_the_models_whatever_is_asked_of_sampling(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, "logprobs": 5, "temperature": 0}
    plain = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    banned = {"logit_bias": {str(token): -100 for token in range(40)}, "temperature": 2, "repetition_penalty": 2,
              "presence_penalty": 1, "top_p": 0.5, "seed": 1}  # fmt: skip
    other = http.post("/v1/completions", json=body | banned).json()["choices"][0]["logprobs"]
    best = {text: value for text, value in other["top_logprobs"][0].items() if text in plain["top_logprobs"][0]}
    assert len(best) == 5 and best == pytest.approx(plain["top_logprobs"][0], abs=1e-5)


def test_the_best_of_several_is_the_one_of_the_greatest_mean(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "seed": 3, "logprobs": 0, "temperature": 1.5}
    every = http.post("/v1/completions", json=body | {"n": 5}).json()
    means = {it["text"]: sum(it["logprobs"]["token_logprobs"]) / 6 for it in every["choices"]}
    best = http.post("/v1/completions", json=body | {"n": 2, "best_of": 5}).json()
    assert [it["text"] for it in best["choices"]] == sorted(means, key=lambda text: -means[text])[:2]
    assert [it["index"] for it in best["choices"]] == [0, 1] and best["usage"]["completion_tokens"] == 30
    assert "logprobs" in best["choices"][0]
    silent = http.post("/v1/completions", json={**body, "logprobs": None, "n": 1, "best_of": 5}).json()["choices"]
    assert silent[0]["logprobs"] is None and silent[0]["text"] == best["choices"][0]["text"]


def test_offsets_of_an_echoed_prompt_lead_to_its_tokens(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "ab€c", "max_tokens": 2, "temperature": 0, "logprobs": 0, "echo": True}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    told = choice["logprobs"]
    assert told["text_offset"][:6] == [0, 1, 2, 2, 2, 3] and choice["text"].startswith("ab€c")
    assert told["top_logprobs"] is None and len(told["token_logprobs"]) == 8


def test_too_much_to_tell_is_refused_with_the_numbers(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": [[1] * 500] * 30, "max_tokens": 1, "logprobs": 20, "echo": True}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 400 and "315,000 log-probabilities" in response.json()["error"]["message"]
