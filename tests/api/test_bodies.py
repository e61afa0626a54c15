"""Bodies that are refused with the field and the reason, whatever was sent; and values that ask for nothing."""

import json
import socket
import time
from typing import Any

import httpx
import pytest

from tests.support.live_server import LiveServer
from tests.support.served import CHAT, COMPLETION, VOCAB

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "says"),
    [
        ("completions", COMPLETION | {"model": "nope"}, 404, "model", "nope"),
        ("chat/completions", CHAT | {"model": "LORA"}, 404, "model", "LORA"),
        ("completions", COMPLETION | {"model": ""}, 404, "model", "does not exist"),
        ("completions", {"prompt": "x"}, 400, "model", "model: Field required"),
        ("completions", COMPLETION | {"model": 5}, 400, "model", "string"),
        ("completions", COMPLETION | {"logprobs": 21}, 400, "logprobs", "logprobs is 21; 0 to 20 are served"),
        ("completions", COMPLETION | {"logprobs": True}, 400, "logprobs", "integer"),
        ("completions", COMPLETION | {"prompt_logprobs": -1}, 400, "prompt_logprobs", "0 to 20 are served"),
        ("completions", COMPLETION | {"prompt_logprobs": 1, "stream": True}, 400, "prompt_logprobs", "not streamed"),
        ("chat/completions", CHAT | {"logprobs": 3}, 400, "logprobs", "boolean"),
        ("chat/completions", CHAT | {"top_logprobs": 3}, 400, "top_logprobs", "needs logprobs"),
        ("chat/completions", CHAT | {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools",
            "chat template does not write tools"),
        ("chat/completions", CHAT | {"functions": [{"name": "f"}]}, 400, "functions", "functions is not served"),
        ("completions", COMPLETION | {"tools": []}, 400, "tools", "not a field"),
        ("chat/completions", CHAT | {"response_format": {"type": "json_object"}}, 400, "response_format", "not served"),
        ("completions", COMPLETION | {"frequency_penalty": 2.5}, 400, "frequency_penalty", "less than or equal to 2"),
        ("completions", COMPLETION | {"repetition_penalty": 0.009}, 400, "repetition_penalty", "or equal to 0.01"),
        ("completions", COMPLETION | {"min_p": 1.5}, 400, "min_p", "less than or equal to 1"),
        ("completions", COMPLETION | {"logit_bias": [1]}, 400, "logit_bias", "must be an object"),
        ("completions", COMPLETION | {"logit_bias": {"256": 1}}, 400, "logit_bias", "'256'; token ids are 0 to 255"),
        ("completions", COMPLETION | {"logit_bias": {"x": 1}}, 400, "logit_bias", "'x'; token ids are"),
        ("completions", COMPLETION | {"logit_bias": {"\u0663": 1}}, 400, "logit_bias", "token ids are"),
        ("completions", COMPLETION | {"logit_bias": {"3": 101}}, 400, "logit_bias", "a number from -100 to 100"),
        ("completions", COMPLETION | {"logit_bias": {"3": True}}, 400, "logit_bias", "a number from -100 to 100"),
        ("completions", COMPLETION | {"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias", "1024"),
        ("completions", COMPLETION | {"stop_token_ids": [3, 256]}, 400, "stop_token_ids", "stop_token_ids[1]"),
        ("completions", COMPLETION | {"stop_token_ids": [True]}, 400, "stop_token_ids", "stop_token_ids[0]"),
        ("completions", COMPLETION | {"min_tokens": 17}, 400, "min_tokens", "17, and at most 16"),
        ("completions", COMPLETION | {"min_tokens": 5, "max_tokens": 4}, 400, "min_tokens", "5, and at most 4"),
        ("chat/completions", CHAT | {"min_tokens": 2**63}, 400, "min_tokens", "are generated"),
        ("completions", COMPLETION | {"best_of": 17}, 400, "best_of", "from n, 1, to 16"),
        ("completions", COMPLETION | {"best_of": 1, "n": 2}, 400, "best_of", "from n, 2, to 16"),
        ("completions", COMPLETION | {"best_of": 2, "stream": True}, 400, "best_of", "leave stream out"),
        ("completions", COMPLETION | {"prompt": ["x"] * 64, "best_of": 3}, 400, None, "192 completions"),
        ("completions", COMPLETION | {"suffix": "x"}, 400, "suffix", "not served"),
        ("completions", COMPLETION | {"store": True}, 400, "store", "nothing is stored"),
        ("completions", COMPLETION | {"metadata": {"a": 1}}, 400, "metadata", "string"),
        ("completions", COMPLETION | {"metadata": {str(i): "" for i in range(17)}}, 400, "metadata", "at most 16 keys"),
        ("completions", COMPLETION | {"priority": 101}, 400, "priority", "less than or equal to 100"),
        ("completions", COMPLETION | {"timeout": 0}, 400, "timeout", "greater than 0"),
        ("chat/completions", CHAT | {"chat_template_kwargs": {"tools": []}}, 400, "chat_template_kwargs", "sets it"),
        ("chat/completions", CHAT | {"chat_template_kwargs": {"enable_thinking": False}}, 400, "chat_template_kwargs",
            "does not read 'enable_thinking'; of what a request may set it reads: none"),
        ("chat/completions", CHAT | {"chat_template_kwargs": {"a": json.loads("[" * 40 + "]" * 40)}}, 400,
            "chat_template_kwargs", "more than 32 deep"),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]}, 400,
            "messages", "only assistants reason"),
        ("chat/completions", CHAT | {"prompt_cache_retention": "24h"}, 400, "prompt_cache_retention", "not served"),
        ("completions", COMPLETION | {"logit_bias": {"01": 1}}, 400, "logit_bias", "token ids are"),
        ("chat/completions", CHAT | {"continue_final_message": True}, 400, "continue_final_message", "role assistant"),
        ("chat/completions", CHAT | {"continue_final_message": True, "add_generation_prompt": True}, 400,
            "continue_final_message", "two ends"),
        ("chat/completions", CHAT | {"reasoning_effort": "high"}, 400, "reasoning_effort", "does not read"),
        ("chat/completions", CHAT | {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "y"}]},
            400, "messages", "does not read reasoning_content"),
        ("completions", COMPLETION | {"ech0": True}, 400, "ech0", "not a field"),
        ("completions", COMPLETION | {"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ("completions", COMPLETION | {"temperature": 2.1}, 400, "temperature", "less than or equal to 2"),
        ("completions", COMPLETION | {"temperature": "1"}, 400, "temperature", "number"),
        ("completions", COMPLETION | {"top_p": 0}, 400, "top_p", "greater than 0"),
        ("completions", COMPLETION | {"top_k": -2}, 400, "top_k", "greater than or equal to -1"),
        ("completions", COMPLETION | {"top_k": 1.5}, 400, "top_k", "integer"),
        ("completions", COMPLETION | {"max_tokens": 0}, 400, "max_tokens", "nothing is asked of the prompt"),
        ("chat/completions", CHAT | {"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ("completions", COMPLETION | {"max_tokens": True}, 400, "max_tokens", "integer"),
        ("completions", COMPLETION | {"max_tokens": 2**63}, 400, "max_tokens", "maximum context length is 512"),
        ("completions", COMPLETION | {"max_tokens": 512}, 400, "max_tokens", "1 tokens and max_tokens is 512"),
        ("completions", COMPLETION | {"n": 10**18}, 400, "n", "at most 16"),
        ("completions", COMPLETION | {"n": "3"}, 400, "n", "integer"),
        ("completions", COMPLETION | {"seed": 2**64}, 400, "seed", "less than"),
        ("completions", COMPLETION | {"stop": ["a"] * 17}, 400, "stop", "17 stop strings; at most 16"),
        ("completions", COMPLETION | {"stop": ""}, 400, "stop", "empty"),
        ("completions", COMPLETION | {"stream": "yes"}, 400, "stream", "boolean"),
        ("completions", COMPLETION | {"stream_options": {}}, 400, "stream_options", "needs stream"),
        ("completions", COMPLETION | {"prompt": []}, 400, "prompt", "0 prompts"),
        ("completions", COMPLETION | {"prompt": ""}, 400, "prompt", "no tokens"),
        ("completions", COMPLETION | {"prompt": ["a"] * 100_000}, 400, "prompt", "100000 prompts"),
        ("completions", COMPLETION | {"prompt": [3, VOCAB]}, 400, "prompt", rf"prompt[1] is {VOCAB}"),
        ("completions", COMPLETION | {"prompt": [3, -1]}, 400, "prompt", "prompt[1] is -1"),
        ("completions", COMPLETION | {"prompt": [3, 1.0]}, 400, "prompt", "prompt[1] is not a token id"),
        ("completions", COMPLETION | {"prompt": [3, "x"]}, 400, "prompt", "prompt[1] is not a token id"),
        ("completions", COMPLETION | {"prompt": "<|beyond|>"}, 400, "prompt", "token id 256; the model knows 0 to 255"),
        ("completions", COMPLETION | {"prompt": "x" * 600}, 400, "prompt", "600 tokens; this model's maximum"),
        ("completions", COMPLETION | {"prompt": "x" * 500}, 400, "max_tokens", "500 tokens and max_tokens is 16"),
        ("completions", COMPLETION | {"prompt": [3] * 600}, 400, "prompt", "600 tokens; this model's maximum"),
        ("completions", COMPLETION | {"prompt": ["x"] * 64, "n": 3}, 400, None, "192 completions in one request"),
        ("completions", COMPLETION | {"stop": "x" * 1025}, 400, "stop", "1,025 characters; 1 to 1,024"),
        ("completions", COMPLETION | {"user": "x" * 1025}, 400, "user", "at most 1024 characters"),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": ""}] * 1025}, 400, "messages", "1,025"),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 4097}]},
            400, "messages", "4,097 parts"),
        ("completions", COMPLETION | {"prompt": "x" * 9000}, 400, "prompt", "9,000 characters"),
        ("completions", COMPLETION | {"prompt": ["a", [1]]}, 400, "prompt", "prompt[1] is neither"),
        ("completions", COMPLETION | {"prompt": {"a": 1}}, 400, "prompt", "must be a text"),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages",
            "617 tokens; this model's maximum"),
        ("completions", COMPLETION | {"prompt": "\ud800"}, 400, "prompt", "Unicode"),
        ("chat/completions", CHAT | {"messages": []}, 400, "messages", "at least 1"),
        ("chat/completions", CHAT | {"messages": [{"role": "user"}]}, 400, "messages", "needs content"),
        ("chat/completions", CHAT | {"messages": [{"role": "king", "content": "x"}]}, 400, "messages",
            "role: Input should be 'system'"),
        ("chat/completions", CHAT | {"messages": [{"role": "system", "content": "x"}]}, 400, "messages", "no system"),
        ("chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url":
            {"url": "http://127.0.0.1:1/"}}]}]}, 400, "messages",
            "'image_url' in messages is not served: models read text here, and of a multimodal model the text half"),
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


@pytest.mark.parametrize(
    ("route", "more", "param"),
    [
        ("completions", '"prompt": "a", "\\ud800": 1', "?"),
        ("completions", '"prompt": "a", "stop": "\\udc00"', "stop"),
        ("completions", '"prompt": "a", "metadata": {"\\ud800": "a"}', "metadata"),
        ("chat/completions", '"messages": [{"role": "user", "content": "a", "\\ud800": 1}]', "messages"),
        ("responses", '"input": "a", "metadata": {"a": "\\ud800"}', "metadata"),
        ("responses", '"input": "a", "instructions": "\\ud800"', "instructions"),
        ("embeddings", '"input": ["a", "\\uDFFF"]', "input"),
    ],
)
def test_halves_of_surrogate_pairs_are_refused(http: httpx.Client, route: str, more: str, param: str) -> None:
    raw = f'{{"model": "tiny", {more}}}'
    response = http.post(f"/v1/{route}", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and "half of a surrogate pair" in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == param


def test_whole_surrogate_pairs_are_letters(http: httpx.Client) -> None:
    raw = '{"model": "tiny", "prompt": "\\ud83d\\ude00", "max_tokens": 1, "echo": true}'
    response = http.post("/v1/completions", content=raw, headers={"Content-Type": "application/json"})
    assert response.json()["choices"][0]["text"].startswith("😀")


@pytest.mark.parametrize("prompt", [[1.5] * 200_000, [[1.5]] * 100_000, ["x"] * 300_000 + [1], "word " * 300_000])
def test_large_wrong_bodies_cost_little(http: httpx.Client, prompt: Any) -> None:
    start = time.monotonic()
    assert http.post("/v1/completions", json={"model": "tiny", "prompt": prompt}).status_code == 400
    assert http.post("/v1/chat/completions", json={"model": "tiny", "messages": prompt}).status_code == 400
    assert time.monotonic() - start < 3


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error_of_ours(server: LiveServer) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head + b'{"model":')
        time.sleep(0.2)
    time.sleep(0.3)
    assert "Traceback" not in server.output() and "unexpected error" not in server.output()


def test_no_op_values_of_unserved_fields_are_taken(http: httpx.Client) -> None:
    nothing = {"suffix": "", "response_format": {"type": "text"}, "use_beam_search": False, "guided_json": None}
    labels = {"user": "somebody", "metadata": {"run": "7"}, "store": False, "prompt_cache_key": "k",
              "safety_identifier": "s", "service_tier": "auto"}  # fmt: skip
    body = COMPLETION | nothing | labels | {"max_tokens": 1}
    assert http.post("/v1/completions", json=body).status_code == 200
