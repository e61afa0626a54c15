"""/tokenize and /detokenize say what the model would read: the numbers that completions and chat count."""

from typing import Any

import httpx
import pytest

from tests.support.served import CHAT, PROMPT, VOCAB

pytestmark = pytest.mark.slow
CONTEXT = 512
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% if shout %}!{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def tokens(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    told: dict[str, Any] = response.json()
    assert told["count"] == len(told["tokens"]) and told["max_model_len"] == CONTEXT
    return told


def error_of(response: httpx.Response) -> tuple[int, str | None, str | None]:
    error = response.json()["error"]
    return response.status_code, error["param"], error["code"]


def test_a_text_becomes_the_tokens_that_a_completion_counts(http: httpx.Client) -> None:
    told = tokens(http, prompt="héllo", model="lora", return_token_strs=True)
    assert told["token_strs"] == ["h", "Ã", "©", "l", "l", "o"]
    answer = http.post("/v1/completions", json={"model": "lora", "prompt": "héllo", "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == told["count"] == 6
    assert tokens(http, prompt="héllo")["token_strs"] is None
    assert tokens(http, prompt="")["tokens"] == []


@pytest.mark.parametrize("asks", [True, False])
def test_a_conversation_becomes_the_tokens_that_a_chat_counts(http: httpx.Client, asks: bool) -> None:
    said = {"messages": [*CHAT["messages"], {"role": "assistant", "content": "y"}], "add_generation_prompt": asks}
    told = tokens(http, **said)
    assert http.post("/detokenize", json={"tokens": told["tokens"]}).json()["prompt"] == (
        "user: x\nassistant: y\n" + "assistant:" * asks
    )
    answer = http.post("/v1/chat/completions", json=said | {"model": "tiny", "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == told["count"]


def test_an_adapters_own_template_counts(http: httpx.Client, root: Any) -> None:
    body = {"name": "shouter", "path": str(root / "more" / "other"), "manifest": {"chat_template": TEMPLATE}}
    assert http.post("/v1/adapters", json=body).status_code == 201
    said = {"model": "shouter", "messages": CHAT["messages"], "chat_template_kwargs": {"shout": True}}
    told = tokens(http, **said)
    assert http.post("/detokenize", json={"tokens": told["tokens"]}).json() == {"prompt": "<user>x!>"}
    answer = http.post("/v1/chat/completions", json=said | {"max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == told["count"] == 9
    assert http.delete("/v1/adapters/shouter").status_code == 200


def test_what_no_request_could_begin_with_is_refused_as_there(http: httpx.Client) -> None:
    for body, refusal in (
        ({"prompt": "x" * (CONTEXT + 1)}, (400, "prompt", "context_length_exceeded")),
        ({"prompt": "x" * 2_000_000}, (400, "prompt", None)),
        ({"messages": [{"role": "system", "content": "x"}]}, (400, "messages", None)),  # the template's own refusal
        ({"model": "nope", "prompt": "x"}, (404, "model", "model_not_found")),
        ({}, (400, "prompt", "invalid_value")),
        ({"prompt": "x", "messages": CHAT["messages"]}, (400, "prompt", "invalid_value")),
        ({"prompt": "x", "chat_template_kwargs": {"a": 1}}, (400, "chat_template_kwargs", None)),
        ({"prompt": "x", "add_generation_prompt": False}, (400, "add_generation_prompt", None)),
        ({"messages": CHAT["messages"], "add_special_tokens": True},
         (400, "add_special_tokens", "unsupported_parameter")),
        ({"messages": CHAT["messages"], "chat_template": "x"}, (400, "chat_template", "unsupported_parameter")),
        ({"prompt": "x", "promt": "x"}, (400, "promt", "unknown_parameter")),
    ):  # fmt: skip
        assert error_of(http.post("/tokenize", json=body)) == refusal, body
    half = http.post("/tokenize", content=b'{"prompt": "\\ud800"}', headers={"Content-Type": "application/json"})
    assert error_of(half) == (400, "prompt", "invalid_value")


def test_tokens_become_the_text_that_they_stand_for(http: httpx.Client) -> None:
    text = "grüße, 世界 🙂"
    assert http.post("/detokenize", json={"tokens": tokens(http, prompt=text)["tokens"]}).json() == {"prompt": text}
    assert http.post("/detokenize", json={"model": "esft", "tokens": []}).json() == {"prompt": ""}
    for ids, says in (
        ([VOCAB], f"tokens[0] is {VOCAB}; token ids are 0 to {VOCAB - 1}"),
        ([1, -1], "tokens[1] is -1"),
        ([1, True], "tokens[1] is not a token id"),
        ([1.0], "tokens[0] is not a token id"),
        ("x", "tokens is not a list"),
        ([1] * (CONTEXT + 1), f"{CONTEXT + 1} tokens"),
    ):
        response = http.post("/detokenize", json={"tokens": ids})
        assert response.status_code == 400 and says in response.json()["error"]["message"], response.text
    assert http.post("/detokenize", json={"model": "nope", "tokens": PROMPT}).status_code == 404
