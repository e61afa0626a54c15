"""/v1/responses as OpenAI's client meets it, on a real server."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from tests.support.live_server import LiveServer
from tests.support.schemas import MORE_IN_RESPONSES, NOT_OF_RESPONSES, checked, typed_events
from tests.support.served import CHAT, settle

pytestmark = pytest.mark.slow
BODY: dict[str, Any] = {"model": "tiny", "input": "x"}
PLAIN: dict[str, Any] = {"temperature": 0, "max_output_tokens": 12}
LOGPROBS = "message.output_text.logprobs"
SYSTEM = "{% for it in messages %}{{ it.role }}={{ it.content }};{% endfor %}{{ reasoning_effort or '' }}"


def chat(client: openai.OpenAI, messages: Any, model: str = "tiny", **options: Any) -> Any:
    options = {"temperature": 0, "max_tokens": 12} | options
    return client.chat.completions.create(model=model, messages=messages, **options)


@pytest.fixture(scope="module")
def told(http: httpx.Client) -> Iterator[str]:
    """An adapter whose template takes messages of all roles, and an effort."""
    body = {"name": "told", "path": "../more/late", "manifest": {"chat_template": SYSTEM}}
    assert http.post("/v1/adapters", json=body).status_code == 201
    yield "told"
    assert http.delete("/v1/adapters/told").status_code == 200


@pytest.mark.parametrize("model", ["tiny", "lora", "esft"])
def test_the_text_is_what_chat_answers(client: openai.OpenAI, model: str) -> None:
    answer = client.responses.create(model=model, input="hi there", **PLAIN)
    same = chat(client, [{"role": "user", "content": "hi there"}], model)
    assert answer.output_text == same.choices[0].message.content and answer.model == model
    assert answer.status == "incomplete" and answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (same.usage.prompt_tokens, 12)
    assert answer.usage.total_tokens == same.usage.total_tokens


def test_an_answer_has_every_field_and_what_was_asked(http: httpx.Client) -> None:
    asked = {"instructions": None, "metadata": {"a": "b"}, "user": "me", "temperature": 0.5, "top_p": 0.25,
             "store": False, "max_output_tokens": 3, "parallel_tool_calls": False, "tool_choice": "none",
             "max_tool_calls": 2,
             "safety_identifier": "s", "prompt_cache_key": "k", "truncation": "disabled", "background": False,
             "text": {"format": {"type": "text"}}, "tools": [], "presence_penalty": 0.5}  # fmt: skip
    answer = http.post("/v1/responses", json=BODY | asked).json()
    response = checked(Response, answer, NOT_OF_RESPONSES, MORE_IN_RESPONSES)
    assert {name: answer[name] for name in asked} == asked
    assert response.id.startswith("resp_") and response.output[0].id.startswith("msg_")
    assert response.service_tier == "default" and response.error is None


def test_what_a_request_does_not_say_is_told_as_it_was_done(http: httpx.Client) -> None:
    answer = http.post("/v1/responses", json=BODY | {"max_output_tokens": 1}).json()
    assert (answer["temperature"], answer["top_p"], answer["tool_choice"], answer["metadata"]) == (1.0, 1.0, "auto", {})


def test_a_stream_is_the_same_answer(http: httpx.Client) -> None:
    whole = http.post("/v1/responses", json=BODY | PLAIN).json()
    with http.stream("POST", "/v1/responses", json=BODY | PLAIN | {"stream": True}) as streaming:
        assert streaming.headers["content-type"].startswith("text/event-stream")
        events = [(name, json.loads(data)) for name, data in typed_events(streaming)]
    assert all(name == event["type"] for name, event in events)
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
    for _, event in events:
        checked(ResponseStreamEvent, event, NOT_OF_RESPONSES, MORE_IN_RESPONSES)
    last = events[-1][1]["response"]
    text = "".join(event["delta"] for name, event in events if name == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"] == last["output"][0]["content"][0]["text"]
    assert events[-1][0] == "response.incomplete" and last["usage"]["output_tokens"] == 12
    differs = {"id", "created_at", "output", "usage"}
    assert {name for name in whole if whole[name] != last[name]} <= differs and set(whole) == set(last)


def test_the_clients_own_stream_ends_with_the_response(client: openai.OpenAI) -> None:
    text = client.responses.create(**BODY, **PLAIN).output_text
    stop = text[6:8]
    with client.responses.stream(**BODY, **PLAIN, extra_body={"stop": [stop, "never there"]}) as stream:
        response = stream.get_final_response()
    assert response.status == "completed" and response.output_text == text[: text.index(stop)]
    assert response.output[0].status == "completed" and response.completed_at is not None
    items: Any = [{"role": "user", "content": "x"}, *response.output, {"role": "user", "content": "y"}]
    assert client.responses.create(model="tiny", input=items, max_output_tokens=1).status == "incomplete"


def test_a_conversation_goes_on_with_the_clients_own_items(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input="hi", **PLAIN)
    parts = [{"type": "input_text", "text": "and "}, {"type": "input_text", "text": "now"}]
    items: list[Any] = [{"role": "user", "content": "hi"}, *first.output,
                        {"type": "message", "role": "user", "content": parts}]  # fmt: skip
    second = client.responses.create(model="tiny", input=items, **PLAIN)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": first.output_text},
                {"role": "user", "content": "and now"}]  # fmt: skip
    same = chat(client, messages)
    assert second.output_text == same.choices[0].message.content
    assert second.usage is not None and second.usage.input_tokens == same.usage.prompt_tokens
    replayed = [{"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "phase": None, "content":
                [{"type": "output_text", "text": "a", "annotations": [], "logprobs": [{"token": "a"}]}]}]  # fmt: skip
    assert client.responses.create(model="tiny", input=replayed, max_output_tokens=1).id  # type: ignore[arg-type]


def test_instructions_are_the_first_system_message(client: openai.OpenAI, told: str) -> None:
    items: Any = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "hi"}]
    answer = client.responses.create(model=told, instructions="be brief", input=items, **PLAIN)
    messages = [{"role": "system", "content": "be brief"}, {"role": "system", "content": "be kind"},
                {"role": "user", "content": "hi"}]  # fmt: skip
    same = chat(client, messages, told)
    assert answer.output_text == same.choices[0].message.content and answer.instructions == "be brief"
    assert answer.usage is not None and answer.usage.input_tokens == same.usage.prompt_tokens


def test_effort_is_for_templates_that_read_it(client: openai.OpenAI, told: str) -> None:
    counts = {}
    for effort in ("none", "low", "medium"):
        answer = client.responses.create(model=told, input="x", max_output_tokens=1, reasoning={"effort": effort})  # type: ignore[call-overload]
        assert answer.reasoning.effort == effort
        counts[effort] = answer.usage.input_tokens
    assert {effort: count - counts["low"] for effort, count in counts.items()} == {"none": 1, "low": 0, "medium": 3}
    with pytest.raises(openai.BadRequestError, match="does not read 'reasoning_effort'") as raised:
        client.responses.create(**BODY, reasoning={"effort": "low"})
    assert raised.value.param == "reasoning"


def test_logprobs_are_those_of_chat(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"include": [LOGPROBS], "top_logprobs": 2}
    answer = client.responses.create(**BODY, **PLAIN, **asked)
    expected = chat(client, CHAT["messages"], logprobs=True, top_logprobs=2).choices[0].logprobs.content
    told = [it.model_dump() for it in answer.output[0].content[0].logprobs]  # type: ignore[union-attr]
    assert len(told) == 12 and [it["token"] for it in told] == [it.token for it in expected]
    assert [it["logprob"] for it in told] == pytest.approx([it.logprob for it in expected], abs=1e-4)
    assert all(len(it["top_logprobs"]) == 2 for it in told)
    streamed = list(client.responses.create(**BODY, **PLAIN, **asked, stream=True))
    deltas = [entry.token for it in streamed if it.type == "response.output_text.delta" for entry in it.logprobs]
    assert deltas == [it["token"] for it in told]


def test_nothing_is_stored(client: openai.OpenAI, http: httpx.Client) -> None:
    answer = client.responses.create(**BODY, max_output_tokens=1)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel,
                lambda it: list(client.responses.input_items.list(it))):  # fmt: skip
        with pytest.raises(openai.NotFoundError, match="responses are not stored"):
            ask(answer.id)
    assert http.get("/v1/responses").status_code == 405


def test_values_that_ask_for_nothing_are_taken(http: httpx.Client) -> None:
    nothing = {"store": False, "background": False, "tools": [], "tool_choice": "auto", "truncation": "disabled",
               "previous_response_id": None, "conversation": None, "prompt": None, "service_tier": "auto",
               "include": ["reasoning.encrypted_content"], "text": {"format": {"type": "text"}, "verbosity": None},
               "reasoning": {"effort": None, "summary": "auto"}, "instructions": "", "max_tool_calls": 1,
               "stream": True, "stream_options": {"include_obfuscation": False}, "top_logprobs": 0, "n": 1}  # fmt: skip
    assert http.post("/v1/responses", json=BODY | nothing | {"max_output_tokens": 1}).status_code == 200


def test_what_chat_takes_beside_openais_fields_works_here_too(http: httpx.Client) -> None:
    sampled = [http.post("/v1/responses", json=BODY | {"seed": seed, "max_output_tokens": 10, "cache_salt": "s",
                                                       "priority": -1, "timeout": 60, "min_p": 0.0}).json()
               for seed in (1, 1, 2)]  # fmt: skip
    texts = [it["output"][0]["content"][0]["text"] for it in sampled]
    assert texts[0] == texts[1] != texts[2]
    greedy = http.post("/v1/responses", json=BODY | PLAIN | {"temperature": 1, "top_k": 1}).json()
    plain = http.post("/v1/responses", json=BODY | PLAIN).json()
    assert greedy["output"][0]["content"] == plain["output"][0]["content"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_work(server: LiveServer, stream: bool) -> None:
    body = {"model": "lora", "input": "x", "max_output_tokens": 490, "stream": stream}
    steps = server.stats()["heddle_engine_steps_total"]
    with httpx.Client(base_url=server.url) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/responses", json=body, timeout=httpx.Timeout(10, read=0.0001 if stream else 0.15))
    settle(server)
    assert server.stats()["heddle_engine_steps_total"] - steps < 450


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"model": "nope"}, 404, "model", "nope"),
        ({"input": None}, 400, "input", "must be a text, or a list of messages"),
        ({"input": []}, 400, "input", "at least 1"),
        ({"input": 5}, 400, "input", "must be a text, or a list of messages"),
        ({"input": [{"role": "king", "content": "x"}]}, 400, "input", "role: Input should be 'user'"),
        ({"input": [{"role": "user"}]}, 400, "input", "required"),
        ({"input": [{"role": "user", "content": 5}]}, 400, "input", "must be a text, or a list of parts"),
        ({"input": [{"role": "user", "content": "x", "name": "y"}]}, 400, "input", "'name' is not a field of input"),
        ({"input": [{"role": "assistant", "content": "x", "phase": "commentary"}]}, 400, "input", "phase in input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, 400, "input", "send the item itself"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, 400, "input",
            "the call 'a' is answered"),
        ({"input": [{"type": "file_search_call", "id": "a"}]}, 400, "input",
            "an item of type 'file_search_call' in input is not served"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://127.0.0.1:1/"}]}]},
            400, "input", "content of type 'input_image' in input is not served: models"),
        ({"input": [{"role": "assistant", "content": [{"type": "output_text", "text": "x", "annotations": [{}]}]}]},
            400, "input", "annotations in input is not served"),
        ({"input": [{"role": "user", "content": ""}] * 1025}, 400, "input", "1,025 messages"),
        ({"input": "x" * 600}, 400, "input", "tokens; this model's maximum"),
        ({"input": "\ud800"}, 400, "input", "Unicode"),
        ({"input": [{"role": "system", "content": "x"}]}, 400, "input", "no system here"),
        ({"instructions": "be brief"}, 400, "input", "no system here"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens", "greater than or equal to 1"),
        ({"max_output_tokens": 512}, 400, "max_output_tokens", "and max_output_tokens is 512"),
        ({"max_tokens": 5}, 400, "max_tokens", "max_tokens is not served; send max_output_tokens"),
        ({"messages": []}, 400, "messages", "send them as input"),
        ({"previous_response_id": "resp_1"}, 400, "previous_response_id", "send the whole conversation as input"),
        ({"conversation": "conv_1"}, 400, "conversation", "send the whole conversation as input"),
        ({"prompt": {"id": "pmpt_1"}}, 400, "prompt", "send its text"),
        ({"store": True}, 400, "store", "nothing is stored here"),
        ({"store": 1}, 400, "store", "boolean"),
        ({"background": True}, 400, "background", "background is not served"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools", "tools of type 'web_search' is not served"),
        ({"tools": [{"type": "function", "name": "f"}]}, 400, "tools", "chat template does not write tools"),
        ({"tool_choice": "required"}, 400, "tool_choice", "there are no tools to call"),
        ({"truncation": "auto"}, 400, "truncation", "truncation is not served"),
        ({"text": {"verbosity": "low"}}, 400, "text", "verbosity in text is not served"),
        ({"text": {"format": {"type": "grammar"}}}, 400, "text", "text.format of type 'grammar' is not served"),
        ({"reasoning": {"summary": "detailed"}}, 400, "reasoning", "summary in reasoning is not served"),
        ({"reasoning": {"effort": "huge"}}, 400, "reasoning", "reasoning.effort"),
        ({"include": ["message.tea"]}, 400, "include", "'message.tea' in include is not served"),
        ({"include": "message"}, 400, "include", "list"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "needs 'message.output_text.logprobs' in include"),
        ({"top_logprobs": 10**6, "include": [LOGPROBS]}, 400, "top_logprobs", "top_logprobs is 1000000"),
        ({"stream_options": {"include_obfuscation": False}}, 400, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, 400, "stream_options", "is not served"),
        ({"service_tier": "flex"}, 400, "service_tier", "'auto'"),
        ({"metadata": {"a": 1}}, 400, "metadata", "string"),
        ({"temperature": 2.5}, 400, "temperature", "less than or equal to 2"),
        ({"stop": ["a"] * 1000}, 400, "stop", "1000 stop strings"),
        ({"n": 2}, 400, "n", "n is not served"),
        ({"teh": 1}, 400, "teh", "'teh' is not a field of this request"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_requests(http: httpx.Client, fields: Any, status: int, param: str, says: str) -> None:
    content = json.dumps(BODY | fields)
    response = http.post("/v1/responses", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param, error
    assert error["type"] == "invalid_request_error" and says in error["message"], error


def test_input_tokens_are_those_of_a_response(client: openai.OpenAI) -> None:
    counted = client.responses.input_tokens.count(model="lora", input="hello", instructions=None)
    answer = client.responses.create(model="lora", input="hello", max_output_tokens=1)
    assert answer.usage is not None and counted.input_tokens == answer.usage.input_tokens
