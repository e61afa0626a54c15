"""Calls of tools, thinking and structured output on /v1/messages: over a socket, with the client that people use."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import BaseModel

from server.api.texts.adapter_texts import AdapterTexts
from server.api.texts.text import Text
from tests.support.schemas import NOT_OF_MESSAGES, checked, typed_events
from tests.support.scripted_server import TEMPLATE, ScriptedServer

PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {"name": "weather", "description": "Of now.", "input_schema": PLACE}
TIME: dict[str, Any] = {"name": "time", "input_schema": {"type": "object", "properties": {}}}
LYON = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lyon"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
ASKS: list[Any] = [{"role": "user", "content": "How warm is it in Lyon?"}]
ASKED: dict[str, Any] = {"model": "tiny", "messages": ASKS, "max_tokens": 300}
WITH_TOOLS: dict[str, Any] = ASKED | {"tools": [WEATHER, TIME]}


class Weather(BaseModel):
    city: str
    is_warm: bool


WARM = '{"city": "Lyon", "is_warm": true}'


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    server = ScriptedServer(tmp_path_factory.mktemp("scripted"))
    with server.running():
        yield server


@pytest.fixture(autouse=True)
def forget(server: ScriptedServer) -> None:
    server.grammars.seen.clear()


@pytest.fixture
def http(server: ScriptedServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as it:
        yield it


@pytest.fixture
def claude(server: ScriptedServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def whole(http: httpx.Client, body: dict[str, Any]) -> Any:
    answer = http.post("/v1/messages", json=body)
    assert answer.status_code == 200, answer.text
    checked(Message, answer.json(), NOT_OF_MESSAGES)
    return answer.json()


def input_tokens(usage: Any) -> int:
    return int(usage.input_tokens + usage.cache_read_input_tokens)


def test_an_answer_has_a_block_for_each_part(http: httpx.Client, server: ScriptedServer) -> None:
    server.says(f"<think>\nWhere is it?\n</think>\n\nI ask.\n{LYON}\n{NOW}")
    message = whole(http, WITH_TOOLS)
    thinking, text, first, second = message["content"]
    assert (thinking["type"], thinking["thinking"], text["text"]) == ("thinking", "Where is it?", "I ask.")
    assert (first["type"], first["name"], first["input"]) == ("tool_use", "weather", {"city": "Lyon"})
    assert (second["name"], second["input"]) == ("time", {}) and first["id"] != second["id"]
    assert message["stop_reason"] == "tool_use"
    assert message["usage"]["output_tokens_details"]["thinking_tokens"] >= len("Where is it?")


def test_a_stream_is_the_same_message(http: httpx.Client, claude: anthropic.Anthropic, server: ScriptedServer) -> None:
    server.says(f"<think>\nWhere is it?\n</think>\n\nI ask.\n{LYON}\n{NOW}")
    with http.stream("POST", "/v1/messages", json=WITH_TOOLS | {"stream": True}) as streaming:
        events = [json.loads(data) for _, data in typed_events(streaming)]
    for it in events:
        if it["type"] != "ping":
            checked(RawMessageStreamEvent, it, NOT_OF_MESSAGES)
    begun = [it["index"] for it in events if it["type"] == "content_block_start"]
    assert begun == [it["index"] for it in events if it["type"] == "content_block_stop"] == [0, 1, 2, 3]
    with claude.messages.stream(**WITH_TOOLS) as stream:
        final = stream.get_final_message()
    expected = Message.model_validate(whole(http, WITH_TOOLS))
    differs: Any = {"id", "parsed_output"}
    assert final.stop_reason == "tool_use" and [it.model_dump(exclude=differs) for it in final.content] == [
        it.model_dump(exclude=differs) for it in expected.content
    ]


def test_a_conversation_goes_on_behind_its_calls(claude: anthropic.Anthropic, server: ScriptedServer) -> None:
    server.says(f"<think>Hm.</think>I ask.{LYON}\n{NOW}")
    first = claude.messages.create(**WITH_TOOLS)
    results: Any = [{"type": "tool_result", "tool_use_id": it.id, "content": "20"} for it in first.content
                    if it.type == "tool_use"]  # fmt: skip
    results[1]["is_error"] = True
    turns: list[Any] = [*ASKS, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    server.says("It is 20.")
    second = claude.messages.create(**WITH_TOOLS | {"messages": turns})
    assert [it.type for it in second.content] == ["text"] and second.stop_reason == "end_turn"
    added = "<think>Hm.</think>I ask." + LYON + NOW + "tool: 20tool: Error: 20"
    assert input_tokens(second.usage) - input_tokens(first.usage) >= len(added)
    counted = claude.messages.count_tokens(model="tiny", messages=turns, tools=WITH_TOOLS["tools"])
    assert counted.input_tokens == input_tokens(second.usage)
    without = claude.messages.count_tokens(
        model="tiny", messages=ASKS, tools=WITH_TOOLS["tools"], tool_choice={"type": "none"}
    )
    assert without.input_tokens == claude.messages.count_tokens(model="tiny", messages=ASKS).input_tokens


def test_anthropics_client_runs_tools(claude: anthropic.Anthropic, server: ScriptedServer) -> None:
    asked: list[str] = []

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Of now."""
        asked.append(city)
        server.says("It is 20.")
        return "20"

    server.says(f"<think>Hm.</think>{LYON}")
    final = claude.beta.messages.tool_runner(**ASKED, tools=[weather]).until_done()
    assert asked == ["Lyon"] and [it.text for it in final.content if it.type == "text"] == ["It is 20."]


def test_anthropics_client_parses_what_it_asked_for(claude: anthropic.Anthropic, server: ScriptedServer) -> None:
    server.says(f"<think>Hm.</think>{WARM}")
    message = claude.messages.parse(**ASKED, output_format=Weather)
    assert message.parsed_output == Weather(city="Lyon", is_warm=True)
    (source,) = server.grammars.seen
    assert (source.kind, source.param) == ("json_schema", "output_config") and "think" in source.before
    turns: list[Any] = [*ASKS, {"role": "assistant", "content": message.content}, *ASKS]
    assert claude.messages.create(**ASKED | {"messages": turns}).stop_reason == "end_turn"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "time"}])
def test_who_must_call_is_held_to_it(http: httpx.Client, server: ScriptedServer, choice: Any) -> None:
    server.says(NOW)
    message = whole(http, WITH_TOOLS | {"tool_choice": choice})
    assert [it["type"] for it in message["content"]] == ["tool_use"]
    (source,) = server.grammars.seen
    assert (source.kind, source.param) == ("lark", "tools") and ("weather" in source.text) == (choice["type"] == "any")


def test_a_call_that_is_cut_tells_what_had_come(http: httpx.Client, server: ScriptedServer) -> None:
    server.says(LYON)
    message = whole(http, WITH_TOOLS | {"max_tokens": 55})
    (call,) = message["content"]
    assert message["stop_reason"] == "max_tokens" and call["input"] in ({}, {"city": "Lyon"})


def test_plain_requests_have_nothing_compiled(http: httpx.Client, server: ScriptedServer) -> None:
    server.says("Warm.")
    message = whole(http, ASKED | {"tools": [], "output_config": {}})
    assert [it["type"] for it in message["content"]] == ["text"] and server.grammars.seen == []


# -- thinking ---


@pytest.fixture
def template(server: ScriptedServer) -> Iterator[Any]:
    """Has the base speak by another template."""
    before = server.service.texts

    def put(template: str) -> None:
        file = server.root / "model" / "tokenizer_config.json"
        file.write_text(json.dumps({"chat_template": template}))
        server.service.texts = AdapterTexts(Text.load(server.root / "model"))

    yield put
    server.service.texts = before


SWITCH = "{% if enable_thinking is defined %}thinks: {{ enable_thinking }}{% endif %}"
WITHOUT = "{% for it in messages %}{{ it.role }}: {{ it.content }}{% endfor %}"


def test_thinking_is_the_templates_own_variable(claude: anthropic.Anthropic, template: Any) -> None:
    template(TEMPLATE + SWITCH)
    counts = {}
    kinds: list[Any] = [None, {"type": "disabled"}, {"type": "adaptive"}, {"type": "enabled", "budget_tokens": 1024}]
    for kind in kinds:
        fields: Any = {} if kind is None else {"thinking": kind}
        counts[str(kind)] = claude.messages.count_tokens(model="tiny", messages=ASKS, **fields).input_tokens
    none, disabled, *on = counts.values()
    assert [disabled - none, *(it - none for it in on)] == [len("thinks: False"), *[len("thinks: True")] * 2]


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        (TEMPLATE, "disabled", "always has the model reason"),
        (TEMPLATE, "adaptive", None),
        (WITHOUT, "disabled", None),
        (WITHOUT, "adaptive", "has no place for reasoning"),
    ],
)
def test_who_cannot_choose_is_told(http: httpx.Client, template: Any, source: str, kind: str, says: str | None) -> None:
    template(source)
    answer = http.post("/v1/messages", json=ASKED | {"thinking": {"type": kind}})
    assert answer.status_code == (200 if says is None else 400)
    assert says is None or says in answer.json()["error"]["message"]


def test_thinking_that_a_template_does_not_read_is_left_out(claude: anthropic.Anthropic, template: Any) -> None:
    template(WITHOUT)
    text, thinking = {"type": "text", "text": "So."}, {"type": "thinking", "thinking": "Hm.", "signature": "unsigned"}
    said: Any = [[*ASKS, {"role": "assistant", "content": it}, *ASKS] for it in ([text], [thinking, text])]
    counts = [claude.messages.count_tokens(model="tiny", messages=it) for it in said]
    assert counts[0].input_tokens == counts[1].input_tokens


def test_effort_is_for_templates_that_read_it(http: httpx.Client, template: Any) -> None:
    body = ASKED | {"output_config": {"effort": "low"}}
    answer = http.post("/v1/messages", json=body)
    assert answer.status_code == 400 and "does not read 'reasoning_effort'" in answer.json()["error"]["message"]
    template(TEMPLATE + "{{ reasoning_effort }}")
    assert http.post("/v1/messages", json=body).status_code == 200
