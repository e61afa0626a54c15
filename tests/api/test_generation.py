"""The whole server as its users meet it: real processes, a real socket, the openai client, and curl's bytes."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from tests.support.live_server import LiveServer
from tests.support.served import CHAT, COMPLETION, PROMPT, VOCAB, decode, events, settle, stream_text

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model", ["tiny", "lora", "esft"])
def test_completions_equal_the_merged_model(
    client: openai.OpenAI, root: Path, expected: Callable[[str, int], list[int]], model: str
) -> None:
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text == decode(root, expected(model, 12))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (9, 12, 21)


def test_many_at_once_through_all_adapters(
    server: LiveServer, root: Path, expected: Callable[[str, int], list[int]]
) -> None:
    texts = {model: decode(root, expected(model, 20)) for model in ("tiny", "lora", "esft")}
    assert len(set(texts.values())) == 3

    async def all_of_them() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def one(model: str) -> tuple[str, str]:
                answer = await client.completions.create(model=model, prompt=PROMPT, max_tokens=20, temperature=0)
                return model, answer.choices[0].text

            return await asyncio.gather(*(one(model) for model in list(texts) * 12))

    answers = asyncio.run(all_of_them())
    assert len(answers) == 36 and all(text == texts[model] for model, text in answers)
    settle(server)


def test_chat_streams_what_it_would_have_answered(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "lora", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 15,
                               "temperature": 0}  # fmt: skip
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(it.choices[0].delta.content or "" for it in chunks if it.choices) == whole.choices[0].message.content
    assert [it.choices[0].finish_reason for it in chunks if it.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 15
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens == len("user: hi\nassistant:")
    assert len({it.id for it in chunks}) == 1
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    again = client.chat.completions.create(**options | {"messages": parts})
    assert again.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize("stop", [None, "\ufffdx"])
def test_the_first_token_is_an_event_although_it_has_no_text(server: LiveServer, route: str, stop: str | None) -> None:
    """Each token is the first byte of a character of three, and no second one ever comes."""
    byte = sorted(ByteLevel.alphabet()).index("\u00e2")
    asked = CHAT if "chat" in route else COMPLETION
    body = {**asked, "stream": True, "max_tokens": 4, "logit_bias": {str(byte): 100}, "stop": stop}
    with httpx.stream("POST", f"{server.url}/v1/{route}", json=body) as response:
        first, *_, last = [it["choices"][0] for it in events(response.iter_lines())]
    assert first["finish_reason"] is None and last["finish_reason"] == "length"
    said = [(it.get("delta") or {}).get("content", it.get("text")) for it in (first, last)]
    assert said == ["", "\ufffd" * 4]
    assert "delta" not in first or first["delta"]["role"] == "assistant"


def test_a_conversation_goes_on_with_the_clients_own_objects(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    messages += [first.choices[0].message, {"role": "user", "content": "and"}]  # an object with many empty fields
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    assert first.usage is not None and second.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    with pytest.raises(openai.BadRequestError, match="chat template does not write calls of tools"):
        client.chat.completions.create(model="tiny", messages=messages)


def test_a_prompt_may_end_in_the_models_own_turn(http: httpx.Client) -> None:
    def num_tokens(**fields: Any) -> int:
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hel"}]
        body = {"model": "tiny", "messages": messages, "max_tokens": 1, **fields}
        return int(http.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"])

    assert num_tokens(continue_final_message=True) == len("user: hi\nassistant: Hel")
    assert num_tokens(add_generation_prompt=False) == len("user: hi\nassistant: Hel\n")
    assert num_tokens() == len("user: hi\nassistant: Hel\nassistant:")


def test_developer_messages_reach_the_template_as_system_messages(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": [{"role": "developer", "content": "be brief"}]}
    assert "no system here" in http.post("/v1/chat/completions", json=body).json()["error"]["message"]


def test_a_prompt_is_counted_once_however_many_choices(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": [3 + i % 200 for i in range(64)], "n": 4, "max_tokens": 2}
    for _ in range(2):
        usage = http.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] == 64 and usage["prompt_tokens_details"]["cached_tokens"] == 48


def test_streams_end_with_done_and_usage_only_if_asked(http: httpx.Client) -> None:
    plain = stream_text(http, model="esft", max_tokens=5, temperature=0)
    assert plain and all("usage" not in event for event in plain)
    with_usage = stream_text(http, model="esft", max_tokens=5, temperature=0, stream_options={"include_usage": True})
    assert with_usage[-1]["usage"]["completion_tokens"] == 5 and with_usage[0]["usage"] is None


def test_seeds_n_and_temperature(client: openai.OpenAI) -> None:
    def sampled(seed: int, n: int = 1, **options: Any) -> list[str]:
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=10, seed=seed, n=n, **options)
        return [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]

    assert sampled(7) == sampled(7)
    assert sampled(7) != sampled(8)
    several = sampled(7, n=4)
    assert len(set(several)) == 4 and several[0] == sampled(7)[0]
    assert sampled(1, extra_body={"top_k": 1}) == sampled(2, temperature=0) == sampled(3, top_p=1e-6)


def test_several_prompts_and_streamed_choices(http: httpx.Client, root: Path) -> None:
    body = {"model": "lora", "prompt": [PROMPT, PROMPT[:4], PROMPT[2:5]], "max_tokens": 6, "temperature": 0, "n": 2}
    answer = http.post("/v1/completions", json=body).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"]["prompt_tokens"] == 9 + 4 + 3 and answer["usage"]["completion_tokens"] == 36
    texts = [""] * 6
    for event in stream_text(http, **body):
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [choice["text"] for choice in answer["choices"]]


def test_stop_strings_end_the_answer_and_the_work(http: httpx.Client, server: LiveServer) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "temperature": 0}
    full = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    stop = full[6:8]
    answer = http.post("/v1/completions", json=body | {"stop": [stop, "never there"]}).json()
    assert answer["choices"][0]["text"] == full[: full.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 30
    streamed = stream_text(http, **body, stop=stop)
    assert "".join(event["choices"][0]["text"] for event in streamed) == full[: full.index(stop)]
    settle(server)


def test_a_repeated_prompt_is_found_in_the_prefix_cache(http: httpx.Client) -> None:
    long = [(7 * i) % VOCAB for i in range(100)]
    body = {"model": "lora", "prompt": long, "max_tokens": 4, "temperature": 0}
    first, second = (http.post("/v1/completions", json=body).json() for _ in range(2))
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 96
    other = http.post("/v1/completions", json=body | {"model": "tiny"}).json()
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
