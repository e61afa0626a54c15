"""/v1/messages as Anthropic's client meets it, on a real server."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic.types import ErrorResponse, Message, MessageTokensCount, RawMessageStreamEvent

from tests.support.live_server import LiveServer
from tests.support.schemas import NOT_OF_MESSAGES, checked, typed_events
from tests.support.served import settle

pytestmark = pytest.mark.slow
ASKS: list[Any] = [{"role": "user", "content": "hi there"}]
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "messages": ASKS, "temperature": 0}
# the client's own arguments; it has none for how to sample
ASKED: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "messages": ASKS, "extra_body": {"temperature": 0}}
SYSTEM = "{% for it in messages %}<{{ it.role }}>{{ it.content | trim }};{% endfor %}<assistant>"
LOSSY = "{% for it in messages %}{{ it.content[:20] }}{% endfor %}"


@pytest.fixture(scope="module")
def claude(server: LiveServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def told(http: httpx.Client) -> Iterator[str]:
    """An adapter whose template takes messages of all roles, and one whose template writes only their beginnings."""
    for name, template in (("told", SYSTEM), ("lossy", LOSSY)):
        body = {"name": name, "path": "../more/late", "manifest": {"chat_template": template, "stop": ["never there"]}}
        assert http.post("/v1/adapters", json=body).status_code == 201
    yield "told"
    for name in ("told", "lossy"):
        assert http.delete(f"/v1/adapters/{name}").status_code == 200


def input_tokens(usage: Any) -> int:
    return int(usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens)


def chat(client: openai.OpenAI, messages: Any, model: str = "tiny") -> Any:
    return client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=12)


@pytest.mark.parametrize("model", ["tiny", "lora", "esft"])
def test_the_text_is_what_chat_answers(claude: anthropic.Anthropic, client: openai.OpenAI, model: str) -> None:
    message = claude.messages.create(**ASKED | {"model": model})
    same = chat(client, ASKS, model)
    assert [it.text for it in message.content] == [same.choices[0].message.content]  # type: ignore[union-attr]
    assert message.model == model and message.stop_reason == "max_tokens" and message.stop_sequence is None
    assert input_tokens(message.usage) == same.usage.prompt_tokens and message.usage.output_tokens == 12
    assert message._request_id is not None and message._request_id.startswith("req_")


def test_a_message_has_every_field(http: httpx.Client) -> None:
    message = checked(Message, http.post("/v1/messages", json=BODY).json(), NOT_OF_MESSAGES)
    assert message.id.startswith("msg_") and message.usage.service_tier == "standard"


def test_a_stream_is_the_same_message(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    whole = claude.messages.create(**ASKED)
    with http.stream("POST", "/v1/messages", json=BODY | {"stream": True}) as streaming:
        assert streaming.headers["content-type"].startswith("text/event-stream")
        assert streaming.headers["request-id"].startswith("req_")
        events = [(name, json.loads(data)) for name, data in typed_events(streaming)]
    names = [name for name, _ in events]
    assert all(name == event["type"] for name, event in events)
    assert names[:3] == ["message_start", "content_block_start", "ping"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(names[3:-3]) <= {"content_block_delta", "ping"}
    for name, event in events:
        if name != "ping":
            checked(RawMessageStreamEvent, event, NOT_OF_MESSAGES)
    text = "".join(event["delta"]["text"] for name, event in events if name == "content_block_delta")
    assert text == whole.content[0].text  # type: ignore[union-attr]
    with claude.messages.stream(**ASKED) as stream:
        final = stream.get_final_message()
    assert final.content[0].text == text and final.stop_reason == "max_tokens"  # type: ignore[union-attr]
    assert input_tokens(final.usage) == input_tokens(whole.usage) and final.usage.output_tokens == 12


def test_a_stop_sequence_is_named(claude: anthropic.Anthropic, server: LiveServer) -> None:
    text = claude.messages.create(**ASKED | {"max_tokens": 60}).content[0].text  # type: ignore[union-attr]
    stop = text[6:8]
    asked = ASKED | {"max_tokens": 200, "stop_sequences": [stop, "never there"]}
    message = claude.messages.create(**asked)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert message.content[0].text == text[: text.index(stop)]  # type: ignore[union-attr]
    with claude.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", stop)
    assert final.content[0].text == message.content[0].text  # type: ignore[union-attr]
    again: Any = [*ASKS, {"role": final.role, "content": final.content}, *ASKS]
    assert claude.messages.create(**ASKED | {"messages": again}).stop_reason == "max_tokens"
    settle(server)


def test_system_is_the_first_message(claude: anthropic.Anthropic, client: openai.OpenAI, told: str) -> None:
    blocks: Any = [
        {"type": "text", "text": "be "},
        {"type": "text", "text": "brief", "cache_control": {"type": "ephemeral"}},
    ]
    same = chat(client, [{"role": "system", "content": "be brief"}, *ASKS], told)
    for system in ("be brief", blocks):
        message = claude.messages.create(**ASKED | {"model": told}, system=system)
        assert message.content[0].text == same.choices[0].message.content  # type: ignore[union-attr]
        assert input_tokens(message.usage) == same.usage.prompt_tokens
    with pytest.raises(anthropic.BadRequestError, match="no system here"):
        claude.messages.create(**ASKED, system="be brief")


def test_a_conversation_goes_on_with_the_clients_own_blocks(claude: anthropic.Anthropic, client: openai.OpenAI) -> None:
    first = claude.messages.create(**ASKED)
    now = {"type": "text", "text": "now", "cache_control": {"type": "ephemeral", "ttl": "1h"}}
    turns = [*ASKS, {"role": "assistant", "content": first.content},
             {"role": "user", "content": [{"type": "text", "text": "and "}, now]}]  # fmt: skip
    second = claude.messages.create(**ASKED | {"messages": turns})
    said = [*ASKS, {"role": "assistant", "content": first.content[0].text}, {"role": "user", "content": "and now"}]  # type: ignore[union-attr]
    assert second.content[0].text == chat(client, said).choices[0].message.content  # type: ignore[union-attr]


# -- a turn that has begun ---


@pytest.mark.parametrize("begun", ["Sure", "two words ", "", "<|beyond", "assistant:"])
def test_a_turn_that_has_begun_is_continued(claude: anthropic.Anthropic, client: openai.OpenAI, begun: str) -> None:
    """What is answered is what follows, and the model reads nothing between the two."""
    message = claude.messages.create(**ASKED | {"messages": [*ASKS, {"role": "assistant", "content": begun}]})
    prompt = f"user: hi there\nassistant: {begun}"
    same = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0)
    assert message.content[0].text == same.choices[0].text  # type: ignore[union-attr]
    assert same.usage is not None and input_tokens(message.usage) == same.usage.prompt_tokens == len(prompt)


def test_what_a_template_trims_at_the_end_is_kept(
    claude: anthropic.Anthropic, client: openai.OpenAI, told: str
) -> None:
    turns = [{"role": "user", "content": "a<|beyond|>b"}, {"role": "assistant", "content": " the answer "}]
    message = claude.messages.create(**ASKED | {"model": told, "messages": turns})
    assert input_tokens(message.usage) == len("<user>a<|beyond|>b;<assistant>the answer ")


def test_a_turn_that_a_template_does_not_write_out_is_not_continued(claude: anthropic.Anthropic, told: str) -> None:
    turns = [*ASKS, {"role": "assistant", "content": "much longer than twenty letters"}]
    with pytest.raises(anthropic.BadRequestError, match="could not continue it; leave it out"):
        claude.messages.create(**ASKED | {"model": "lossy", "messages": turns})


# -- counting ---


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": "be brief"},
        {"messages": [*ASKS, {"role": "assistant", "content": "Sure"}]},
        {"thinking": {"type": "disabled"}, "tools": [], "tool_choice": {"type": "none"}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "ünï"}]}]},
    ],
    ids=str,
)
def test_tokens_are_counted_as_they_are_used(claude: anthropic.Anthropic, told: str, fields: Any) -> None:
    asked: Any = {"model": told, "messages": ASKS} | fields
    count = claude.messages.count_tokens(**asked)
    assert count.input_tokens == input_tokens(claude.messages.create(max_tokens=1, **asked).usage) > 10
    assert count._request_id is not None


def test_counting_asks_nothing_of_the_engine(http: httpx.Client, server: LiveServer) -> None:
    settle(server)
    before = server.stats()
    counted = http.post("/v1/messages/count_tokens", json={"model": "lora", "messages": ASKS})
    checked(MessageTokensCount, counted.json())
    assert server.stats()["heddle_engine_steps_total"] == before["heddle_engine_steps_total"]


# -- who asks ---


def test_an_aliases_target_is_chosen_by_the_user(http: httpx.Client, claude: anthropic.Anthropic) -> None:
    targets = [{"model": "lora", "weight": 1}, {"model": "esft", "weight": 1}]
    assert http.put("/v1/aliases/either", json={"targets": targets}).status_code == 201
    try:
        chosen = {
            user: {
                claude.messages.create(**ASKED | {"model": "either", "max_tokens": 1}, metadata={"user_id": user}).model
                for _ in range(3)
            }
            for user in map(str, range(12))
        }
    finally:
        assert http.delete("/v1/aliases/either").status_code == 200
    assert all(len(models) == 1 for models in chosen.values())
    assert set.union(*chosen.values()) == {"lora", "esft"}


def test_what_anthropics_clients_send_besides_is_taken(claude: anthropic.Anthropic, http: httpx.Client) -> None:
    headers = {"x-api-key": "k", "anthropic-version": "2023-06-01", "anthropic-beta": "prompt-caching-2024-07-31"}
    nothing = {"tools": [], "tool_choice": {"type": "none"}, "thinking": {"type": "disabled"}, "service_tier": "auto",
               "system": "", "metadata": {"user_id": None}, "cache_control": {"type": "ephemeral"}, "top_k": 0,
               "stop_sequences": []}  # fmt: skip
    assert http.post("/v1/messages", json=BODY | nothing, headers=headers).status_code == 200
    assert claude.beta.messages.create(**ASKED, betas=["prompt-caching-2024-07-31"]).stop_reason == "max_tokens"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_work(server: LiveServer, stream: bool) -> None:
    body = BODY | {"model": "lora", "max_tokens": 480, "stream": stream, "temperature": 1}
    steps = server.stats()["heddle_engine_steps_total"]
    with httpx.Client(base_url=server.url) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/messages", json=body, timeout=httpx.Timeout(10, read=0.0001 if stream else 0.15))
    settle(server)
    assert server.stats()["heddle_engine_steps_total"] - steps < 450


# -- refusals ---


@pytest.mark.parametrize(
    ("fields", "status", "says"),
    [
        ({"model": "nope"}, 404, "nope"),
        ({"max_tokens": None}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": 512}, 400, "and max_tokens is 512"),
        ({"messages": []}, 400, "messages: List should have at least 1 item"),
        ({"messages": "hi"}, 400, "messages: Input should be a valid list"),
        ({"messages": [{"role": "system", "content": "x"}]}, 400, "role: Input should be 'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, 400, "content: Field required"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "content must be a text, or a list of text blocks"),
        ({"system": 5}, 400, "system must be a text, or a list of text blocks"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, 400, "'name' is not a field of messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400,
            "content of type 'image' in messages of the role user is not served: models"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, 400,
            "the call 'x' is answered"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "citations": [{}]}]}]}, 400,
            "citations in content is not served"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "x"}}]}]},
            400, "cache_control.type: Input should be 'ephemeral'"),
        ({"messages": [{"role": "user", "content": ""}] * 1025}, 400, "1,025 messages"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "tokens; this model's maximum"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages is not valid Unicode"),
        ({"system": [{"type": "image"}]}, 400, "content of type 'image' in system is not served"),
        ({"system": [{"type": "text", "text": ""}] * 5000}, 400, "5,000 blocks in system"),
        ({"temperature": 1.5}, 400, "temperature: Input should be less than or equal to 1"),
        ({"top_p": 0}, 400, "top_p"),
        ({"top_k": -1}, 400, "top_k"),
        ({"stop_sequences": "x"}, 400, "stop_sequences: Input should be a valid list"),
        ({"stop_sequences": ["x"] * 1000}, 400, "stop_sequences: 1000 stop strings"),
        ({"stop_sequences": [""]}, 400, "stop_sequences: a stop string may not be empty"),
        ({"metadata": {"who": "me"}}, 400, "'who' is not a field of metadata"),
        ({"service_tier": "priority"}, 400, "service_tier: Input should be 'auto' or 'standard_only'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "template has no place for reasoning"),
        ({"tools": [{"name": "x", "input_schema": {}}]}, 400, "chat template does not write tools"),
        ({"tool_choice": {"type": "any"}}, 400, "there are no tools to call"),
        ({"output_config": {"effort": "low"}}, 400, "does not read 'reasoning_effort'"),
        ({"thread": {"type": "create"}}, 400, "send the whole conversation as messages"),
        ({"mcp_servers": [{}]}, 400, "mcp_servers is not served"),
        ({"container": "c"}, 400, "container is not served"),
        ({"seed": 1}, 400, "'seed' is not a field of this request"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_requests(http: httpx.Client, fields: Any, status: int, says: str) -> None:
    content = json.dumps(BODY | fields)
    response = http.post("/v1/messages", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    error = checked(ErrorResponse, response.json(), more={"details"})
    assert error.error.type == ("not_found_error" if status == 404 else "invalid_request_error")
    assert says in error.error.message, error
    assert error.request_id == response.headers["request-id"]


def test_errors_around_the_route_have_its_shape(http: httpx.Client) -> None:
    json_type = {"Content-Type": "application/json"}
    for response, status, kind in (
        (http.get("/v1/messages"), 405, "invalid_request_error"),
        (http.get("/v1/messages/batches"), 404, "not_found_error"),
        (http.post("/v1/messages", content=b"{"), 400, "invalid_request_error"),
        (http.post("/v1/messages", content=b"{", headers=json_type), 400, "invalid_request_error"),
        (http.post("/v1/messages", content=b" " * (3 << 20), headers=json_type), 413, "request_too_large"),
        (http.post("/v1/messages", content=iter([b" " * (3 << 20)]), headers=json_type), 413, "request_too_large"),
        (http.post("/v1/messages/count_tokens", json=BODY), 400, "invalid_request_error"),
    ):
        body = response.json()
        assert response.status_code == status and set(body) == {"type", "error", "request_id"}
        assert body["type"] == "error" and body["error"]["type"] == kind and set(body["error"]) == {"type", "message"}
        assert body["request_id"] == response.headers["request-id"]
    assert "error" in http.get("/v1/messagesx").json() and "type" not in http.get("/v1/messagesx").json()


def test_the_client_knows_our_refusals(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as raised:
        claude.messages.create(**ASKED | {"model": "nope"})
    assert raised.value.type == "not_found_error" and raised.value.request_id is not None
