"""The whole server as its users meet it: real processes, a real socket, the openai client, curl's bytes."""

import asyncio
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from torch import nn

from adapters_store.catalog import Catalog
from tests.model.test_families import reference
from tests.support.engine_harness import Engine
from tests.support.live_server import LiveServer, write_tokenizer
from tests.support.tiny_adapters import merge, save_esft, save_lora
from tests.support.tiny_models import make_model, save_model

pytestmark = pytest.mark.slow
VOCAB = 256  # one token a byte


def tiny() -> nn.Module:
    return make_model("qwen3_moe", vocab_size=VOCAB)


PROMPT = [5, 99, 23, 7, 150, 42, 8, 8, 61]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    write_tokenizer(save_model(root / "tiny", "qwen3_moe", vocab_size=VOCAB))
    model = tiny()
    save_lora(root / "adapters" / "lora", model, 1, ("q_proj", "v_proj"))
    save_esft(root / "adapters" / "esft", model, 2, {1: [2, 0], 3: [5]})
    save_lora(root / "more" / "late", model, 3, ("o_proj",))
    save_lora(root / "more" / "other", model, 4, ("o_proj",))
    (root / "adapters" / "broken").mkdir()
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[LiveServer]:
    server = LiveServer(str(root / "tiny"), "--adapters", str(root / "adapters"), "--adapter-root", str(root / "more"),
                        log=root / "log").wait_ready()  # fmt: skip
    yield server
    assert server.stop() == 0, server.output()


@pytest.fixture(scope="module")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def expected(root: Path) -> Callable[[str, int], list[int]]:
    """Greedy tokens of PROMPT through each merged model."""
    catalog = Catalog("tiny", Engine(tiny()).assembly.info.base, (root / "adapters", root / "more"))

    def tokens(name: str, count: int) -> list[int]:
        model = tiny()
        if name != "tiny":
            folder = "more" if name in ("late", "other") else "adapters"
            model = merge(model, catalog.read(name, str(root / folder / name)))
        return reference(model, PROMPT, count)

    return tokens


def decode(root: Path, tokens: list[int]) -> str:
    from server.api.text import Text

    decoder = Text.load(root / "tiny").decoder()
    return "".join(decoder.push(token) for token in tokens)


def events(lines: Iterator[str]) -> list[Any]:
    """An independent reading of an event stream; the last one must be [DONE]."""
    text = "\n".join(lines).strip("\n")
    blocks = [block for block in text.split("\n\n") if block]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    assert blocks[-1] == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def stream_text(http: httpx.Client, **body: Any) -> list[Any]:
    with http.stream("POST", "/v1/completions", json={"prompt": PROMPT, "stream": True} | body) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        return events(response.iter_lines())


def settle(server: LiveServer) -> None:
    """Everything is given back: nothing runs, nothing waits, no block is held."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stats = server.stats()
        if stats["heddle_requests_running"] == stats["heddle_requests_waiting"] == stats["heddle_kv_blocks_used"] == 0:
            return
        time.sleep(0.05)
    raise AssertionError(f"not given back: {stats}")


# -- generation ---


def test_models_list_base_and_adapters(client: openai.OpenAI) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert set(models) == {"tiny", "lora", "esft"}
    assert models["tiny"]["parent"] is None and models["tiny"]["root"] == "tiny"
    assert models["lora"]["parent"] == "tiny" and models["lora"]["root"] == "lora"
    assert client.models.retrieve("esft").id == "esft"


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

    assert all(text == texts[model] for model, text in asyncio.run(all_of_them()))
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


def test_a_conversation_goes_on_with_the_clients_own_objects(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "hi"}]
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    messages += [first.choices[0].message, {"role": "user", "content": "and"}]  # an object with many empty fields
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=3)
    assert first.usage is not None and second.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    tool_call = {"role": "assistant", "content": "", "tool_calls": [{"id": "x"}]}
    with pytest.raises(openai.BadRequestError, match="tool_calls in a message is not served"):
        client.chat.completions.create(model="tiny", messages=[*messages, tool_call])  # type: ignore[list-item]


def test_developer_messages_reach_the_template_as_system_messages(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": [{"role": "developer", "content": "be brief"}]}
    assert "no system here" in http.post("/v1/chat/completions", json=body).json()["error"]["message"]


def test_a_prompt_is_counted_once_however_many_choices(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": [3 + i % 200 for i in range(64)], "n": 4, "max_tokens": 2}
    for _ in range(2):
        usage = http.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] == 64 and usage["prompt_tokens_details"]["cached_tokens"] == 48


@pytest.mark.parametrize("prompt", [[1.5] * 200_000, [[1.5]] * 100_000, ["x"] * 300_000 + [1], "word " * 300_000])
def test_large_wrong_bodies_cost_little(http: httpx.Client, prompt: Any) -> None:
    start = time.monotonic()
    assert http.post("/v1/completions", json={"model": "tiny", "prompt": prompt}).status_code == 400
    assert http.post("/v1/chat/completions", json={"model": "tiny", "messages": prompt}).status_code == 400
    assert time.monotonic() - start < 3


def test_streams_end_with_done_and_usage_only_if_asked(http: httpx.Client) -> None:
    plain = stream_text(http, model="esft", max_tokens=5, temperature=0)
    assert all("usage" not in event for event in plain)
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


# -- refusals ---

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
COMPLETION = {"model": "tiny", "prompt": "x"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "says"),
    [
        ("completions", COMPLETION | {"model": "nope"}, 404, "model", "nope"),
        ("chat/completions", CHAT | {"model": "LORA"}, 404, "model", "LORA"),
        ("completions", COMPLETION | {"model": ""}, 404, "model", "does not exist"),
        ("completions", {"prompt": "x"}, 400, "model", "model"),
        ("completions", COMPLETION | {"model": 5}, 400, "model", "string"),
        ("completions", COMPLETION | {"logprobs": 3}, 400, "logprobs", "logprobs is not served"),
        ("chat/completions", CHAT | {"tools": [{}]}, 400, "tools", "tools is not served"),
        ("chat/completions", CHAT | {"response_format": {"type": "json_object"}}, 400, "response_format", "not served"),
        ("completions", COMPLETION | {"frequency_penalty": 0.5}, 400, "frequency_penalty", "not served"),
        ("completions", COMPLETION | {"best_of": 3}, 400, "best_of", "not served"),
        ("completions", COMPLETION | {"ech0": True}, 400, "ech0", "not a field"),
        ("completions", COMPLETION | {"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ("completions", COMPLETION | {"temperature": 2.1}, 400, "temperature", "less than or equal to 2"),
        ("completions", COMPLETION | {"temperature": "1"}, 400, "temperature", "number"),
        ("completions", COMPLETION | {"top_p": 0}, 400, "top_p", "greater than 0"),
        ("completions", COMPLETION | {"top_k": -2}, 400, "top_k", "-1"),
        ("completions", COMPLETION | {"top_k": 1.5}, 400, "top_k", "integer"),
        ("completions", COMPLETION | {"max_tokens": 0}, 400, "max_tokens", "1"),
        ("completions", COMPLETION | {"max_tokens": True}, 400, "max_tokens", "integer"),
        ("completions", COMPLETION | {"max_tokens": 2**63}, 400, "max_tokens", "512"),
        ("completions", COMPLETION | {"max_tokens": 512}, 400, "max_tokens", "1 tokens and max_tokens is 512"),
        ("completions", COMPLETION | {"n": 10**18}, 400, "n", "at most 16"),
        ("completions", COMPLETION | {"n": "3"}, 400, "n", "integer"),
        ("completions", COMPLETION | {"seed": 2**64}, 400, "seed", "less than"),
        ("completions", COMPLETION | {"stop": ["a"] * 5}, 400, "stop", "at most 4"),
        ("completions", COMPLETION | {"stop": ""}, 400, "stop", "empty"),
        ("completions", COMPLETION | {"stream": "yes"}, 400, "stream", "boolean"),
        ("completions", COMPLETION | {"stream_options": {}}, 400, "stream_options", "needs stream"),
        ("completions", COMPLETION | {"prompt": []}, 400, "prompt", "0 prompts"),
        ("completions", COMPLETION | {"prompt": ""}, 400, "prompt", "no tokens"),
        ("completions", COMPLETION | {"prompt": ["a"] * 100_000}, 400, "prompt", "100000 prompts"),
        ("completions", COMPLETION | {"prompt": [3, VOCAB]}, 400, "prompt", rf"prompt[1] is {VOCAB}"),
        ("completions", COMPLETION | {"prompt": [3, -1]}, 400, "prompt", "prompt[1] is -1"),
        ("completions", COMPLETION | {"prompt": [3, 1.0]}, 400, "prompt", "prompt"),
        ("completions", COMPLETION | {"prompt": [3, "x"]}, 400, "prompt", "prompt"),
        ("completions", COMPLETION | {"prompt": "<|beyond|>"}, 400, "prompt", "token id 256; the model knows 0 to 255"),
        ("completions", COMPLETION | {"prompt": "x" * 600}, 400, "prompt", "600 tokens; the model's context has 512"),
        ("completions", COMPLETION | {"prompt": "x" * 500}, 400, "max_tokens", "500 tokens and max_tokens is 16"),
        ("completions", COMPLETION | {"prompt": [3] * 600}, 400, "prompt", "600 tokens; the model's context has 512"),
        ("completions", COMPLETION | {"prompt": ["x"] * 64, "n": 3}, 400, None, "192 completions in one request"),
        ("completions", COMPLETION | {"stop": "x" * 1025}, 400, "stop", "1,025 characters; 1 to 1,024"),
        ("completions", COMPLETION | {"user": "x" * 1025}, 400, "user", "1024"),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": ""}] * 1025}, 400, "messages", "1,025"),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 4097}]},
            400, "messages", "4,097 parts"),
        ("completions", COMPLETION | {"prompt": "x" * 9000}, 400, "prompt", "9,000 characters"),
        ("completions", COMPLETION | {"prompt": ["a", [1]]}, 400, "prompt", "prompt[1] is neither"),
        ("completions", COMPLETION | {"prompt": {"a": 1}}, 400, "prompt", "must be a text"),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages",
            "617 tokens; the model's context has 512"),
        ("completions", COMPLETION | {"prompt": "\ud800"}, 400, "prompt", "Unicode"),
        ("chat/completions", CHAT | {"messages": []}, 400, "messages", "at least 1"),
        ("chat/completions", CHAT | {"messages": [{"role": "user"}]}, 400, "messages", "required"),
        ("chat/completions", CHAT | {"messages": [{"role": "king", "content": "x"}]}, 400, "messages", "role"),
        ("chat/completions", CHAT | {"messages": [{"role": "system", "content": "x"}]}, 400, "messages", "no system"),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url":
            {"url": "http://127.0.0.1:1/"}}]}]}, 400, "messages", "'image_url' is not served"),
        ("chat/completions", CHAT | {"chat_template": "{{ 7 }}"}, 400, "chat_template", "not served"),
        ("chat/completions", CHAT | {"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", "same thing"),
    ],
)  # fmt: skip
def test_bad_requests(http: httpx.Client, path: str, body: Any, status: int, param: str | None, says: str) -> None:
    response = http.post(f"/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
    assert error["type"] == "invalid_request_error" and says in error["message"]
    assert len(response.content) < 4096 and "Traceback" not in response.text and "/work" not in response.text


@pytest.mark.parametrize(
    "raw",
    [b"", b"null", b"[]", b'"x"', b"{", b"[" * 100_000, b"\xff\xfe",
     b'{"model": "tiny", "prompt": "x", "n": ' + b"9" * 5000 + b"}",
     b'{"model": "tiny", "prompt": "x", "model": "lora"}', '{"model": "tiny", "prompt": "x"}'.encode("utf-16"),
     b'{"model": "tiny", "prompt": "x", "stream_options": {"a": 1, "a": 1}}', b'{"a": "' + b'\\"' * 500_000,
     b'{"model": "tiny", "prompt": "x", "temperature": NaN}', b'{"model": "tiny", "prompt": "x", "top_p": 1e999}'],
    ids=lambda raw: repr(raw[:30]),
)  # fmt: skip
def test_bodies_that_are_no_requests(http: httpx.Client, raw: bytes) -> None:
    response = http.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and set(response.json()) == {"error"}, response.text


def test_halves_of_surrogate_pairs_in_a_key_are_refused(http: httpx.Client) -> None:
    for raw in (b'{"model": "tiny", "prompt": "a", "\\ud800": 1}',
                b'{"model": "tiny", "messages": [{"role": "user", "content": "a", "\\ud800": 1}]}'):  # fmt: skip
        route = "completions" if b"prompt" in raw else "chat/completions"
        response = http.post(f"/v1/{route}", content=raw, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and "is not a field" in response.json()["error"]["message"]


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_ours(server: LiveServer) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + b'{"model":')
        time.sleep(0.2)
    time.sleep(0.3)
    assert "Traceback" not in server.output() and "unexpected error" not in server.output()


def test_limits_on_the_body(http: httpx.Client) -> None:
    too_long = http.post("/v1/completions", content=b" " * (3 << 20))
    assert too_long.status_code == 413 and "2,097,152" in too_long.json()["error"]["message"]

    def chunks() -> Iterator[bytes]:
        for _ in range(8):
            yield b" " * (1 << 19)

    headers = {"Content-Type": "application/json"}
    assert http.post("/v1/completions", content=chunks(), headers=headers).status_code == 413
    zipped = http.post("/v1/completions", content=b"x", headers={"Content-Encoding": "gzip"})
    assert zipped.status_code == 415


def test_unknown_routes_and_methods_answer_in_the_same_shape(http: httpx.Client) -> None:
    for method, path, status in (("GET", "/nope", 404), ("GET", "/v1/completions", 405), ("GET", "//v1/models", 404),
                                 ("GET", "/v1/models/nope", 404), ("GET", "/v1/adapters/nope", 404)):  # fmt: skip
        response = http.request(method, path)
        assert response.status_code == status and set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_no_op_values_of_unserved_fields_are_taken(http: httpx.Client) -> None:
    nothing = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": None, "echo": False, "best_of": 1}
    body = COMPLETION | nothing | {"user": "somebody", "max_tokens": 1}
    assert http.post("/v1/completions", json=body).status_code == 200


# -- adapters while others decode ---


def test_adapters_come_and_go_while_others_decode(
    http: httpx.Client, root: Path, server: LiveServer, expected: Callable[[str, int], list[int]]
) -> None:
    late = root / "more" / "late"
    long = {"model": "esft", "prompt": PROMPT, "max_tokens": 400, "stream": True, "temperature": 0}
    with http.stream("POST", "/v1/completions", json=long) as streaming:
        lines = streaming.iter_lines()
        next(lines)
        added = http.post("/v1/adapters", json={"name": "late", "path": str(late)})
        assert added.status_code == 201 and added.json()["kind"] == "lora"
        assert http.post("/v1/adapters", json={"name": "late", "path": str(late)}).status_code == 200
        answer = http.post(
            "/v1/completions", json={"model": "late", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        )
        assert answer.json()["choices"][0]["text"] == decode(root, expected("late", 12))
        shown = http.get("/v1/adapters/late").json()
        assert shown["device"]["state"] == "resident" and shown["device"]["bytes"] > 0
        assert shown["linears"]["model.layers.0.self_attn.o_proj"] == {"rank": 4, "scale": 2.0}
        assert {it["id"] for it in http.get("/v1/adapters").json()["data"]} == {"lora", "esft", "late"}
        # the adapter that is streaming is deleted: its stream goes on, new requests do not find it
        assert http.delete("/v1/adapters/esft").json() == {"id": "esft", "object": "adapter", "deleted": True}
        assert http.post("/v1/completions", json=COMPLETION | {"model": "esft"}).status_code == 404
        streamed = "".join(it["choices"][0]["text"] for it in events(lines))
    assert decode(root, expected("esft", 400)).endswith(streamed[-300:])
    assert http.delete("/v1/adapters/late").status_code == 200
    assert http.delete("/v1/adapters/late").status_code == 404
    assert http.delete("/v1/adapters/tiny").status_code == 409
    assert http.post("/v1/adapters", json={"name": "esft", "path": "esft"}).status_code == 201
    settle(server)


def test_the_same_name_with_other_weights_answers_with_the_new_ones(
    http: httpx.Client, root: Path, expected: Callable[[str, int], list[int]]
) -> None:
    for weights in ("late", "other", "late"):
        assert (
            http.post("/v1/adapters", json={"name": "changing", "path": str(root / "more" / weights)}).status_code
            == 201
        )
        body = {"model": "changing", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == decode(
            root, expected(weights, 12)
        )
        assert http.delete("/v1/adapters/changing").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"name": "x", "path": "/etc"}, 400, "outside"),
        ({"name": "x", "path": "a" * 300}, 422, "cannot be read: File name too long"),
        ({"name": "x", "path": "../tiny"}, 400, "outside"),
        ({"name": "x", "path": "nowhere"}, 422, "not a directory"),
        ({"name": "x", "path": "broken"}, 422, "holds no adapter"),
        ({"name": "a/b", "path": "lora"}, 400, "not an adapter name"),
        ({"name": "tiny", "path": "lora"}, 409, "base model"),
        ({"name": "esft", "path": "lora"}, 409, "taken"),
        ({"name": "x"}, 400, "path"),
        ({"name": "x", "path": "lora", "force": True}, 400, "force"),
    ],
)
def test_adapter_refusals(http: httpx.Client, body: dict[str, Any], status: int, says: str) -> None:
    response = http.post("/v1/adapters", json=body)
    assert response.status_code == status and says in response.json()["error"]["message"], response.text


def test_an_adapter_that_does_not_fit_is_refused_with_the_list(http: httpx.Client, root: Path) -> None:
    directory = root / "adapters" / "misfit"
    save_lora(directory, make_model("llama"), 1, ("up_proj",))  # a dense model's
    response = http.post("/v1/adapters", json={"name": "misfit", "path": "misfit"})
    shutil.rmtree(directory)
    error = response.json()["error"]
    assert response.status_code == 422 and error["code"] == "adapter_does_not_fit"
    assert (
        "8 of the adapter's tensors" in error["message"] and "no linear model.layers.0.mlp.up_proj" in error["message"]
    )


# -- clients that leave ---


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks_and_its_pin(server: LiveServer, stream: bool) -> None:
    body = {"model": "lora", "prompt": PROMPT, "max_tokens": 490, "stream": stream, "n": 4}
    steps = server.stats()["heddle_engine_steps_total"]
    with httpx.Client(base_url=server.url) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json=body, timeout=httpx.Timeout(10, read=0.15 if not stream else 0.0001))
    settle(server)
    assert server.stats()["heddle_engine_steps_total"] - steps < 450


def test_metrics_count_by_model(http: httpx.Client) -> None:
    http.post("/v1/completions", json=COMPLETION | {"max_tokens": 3, "model": "lora"})
    text = http.get("/metrics").text
    assert 'heddle_requests_total{finish="length",model="lora"}' in text
    assert 'heddle_time_to_first_token_seconds_count{model="lora"}' in text
    assert "heddle_engine_up 1.0" in text


def test_the_console_says_what_is_served(server: LiveServer) -> None:
    output = " ".join(server.output().split())
    assert "base (qwen3_moe)" in output and "broken refused" in output and "curl http://127.0.0.1" in output
