"""Calls of tools, reasoning and structured output on /v1/responses: over a socket, with the client that people use."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

from server.api.texts.adapter_texts import AdapterTexts
from server.api.texts.text import Text
from tests.support.schemas import MORE_IN_RESPONSES, NOT_OF_RESPONSES, checked, typed_events
from tests.support.scripted_server import TEMPLATE, ScriptedServer

PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {"type": "function", "name": "weather", "description": "Of now.", "parameters": PLACE}
TIME: dict[str, Any] = {"type": "function", "name": "time"}
LYON = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lyon"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
ASKED: dict[str, Any] = {"model": "tiny", "input": "How warm is it in Lyon?", "max_output_tokens": 300}
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
def client(server: ScriptedServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as it:
        yield it


def whole(http: httpx.Client, body: dict[str, Any]) -> Any:
    answer = http.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    checked(Response, answer.json(), NOT_OF_RESPONSES, MORE_IN_RESPONSES)
    return answer.json()


def without_ids(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in it.items() if name not in ("id", "call_id")} for it in output]


def test_an_answer_has_an_item_for_each_part(http: httpx.Client, server: ScriptedServer) -> None:
    server.says(f"<think>\nWhere is it?\n</think>\n\nI ask.\n{LYON}\n{NOW}")
    answer = whole(http, WITH_TOOLS)
    reasoning, message, first, second = answer["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "Where is it?"}] and reasoning["summary"] == []
    assert message["content"][0]["text"] == "I ask." and answer["status"] == "completed"
    assert (first["type"], first["name"], first["arguments"]) == ("function_call", "weather", '{"city": "Lyon"}')
    assert (second["name"], second["arguments"]) == ("time", "{}") and first["call_id"] != second["call_id"]
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] >= len("Where is it?")
    assert answer["tools"][0] == WEATHER | {"strict": False} and answer["tool_choice"] == "auto"
    assert server.grammars.seen == []


def test_texts_on_both_sides_of_a_call_are_two_messages(http: httpx.Client, server: ScriptedServer) -> None:
    server.says(f"Sure! {LYON}\n\nAnything else?")
    first, call, second = whole(http, WITH_TOOLS)["output"]
    assert [it["content"][0]["text"] for it in (first, second)] == ["Sure!", "Anything else?"]
    assert call["type"] == "function_call"


def test_a_stream_is_the_same_answer(http: httpx.Client, server: ScriptedServer) -> None:
    server.says(f"<think>\nWhere is it?\n</think>\n\nI ask.\n{LYON}\n{NOW}")
    with http.stream("POST", "/v1/responses", json=WITH_TOOLS | {"stream": True}) as streaming:
        events = [json.loads(data) for _, data in typed_events(streaming)]
    assert [it["sequence_number"] for it in events] == list(range(len(events)))
    for it in events:
        checked(ResponseStreamEvent, it, NOT_OF_RESPONSES, MORE_IN_RESPONSES)
    last = events[-1]["response"]
    assert without_ids(last["output"]) == without_ids(whole(http, WITH_TOOLS)["output"])
    for index, item in enumerate(last["output"]):
        its = [it for it in events if it.get("output_index") == index]
        assert [its[0]["type"], its[-1]["type"]] == ["response.output_item.added", "response.output_item.done"]
        assert its[-1]["item"] == item
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert "".join(it["delta"] for it in its if it["type"].endswith(".delta")) == text
    assert sum(it["type"] == "response.function_call_arguments.delta" for it in events) > 10


def test_a_conversation_goes_on_behind_its_calls(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.says(f"<think>Hm.</think>I ask.{LYON}\n{NOW}")
    first = client.responses.create(**WITH_TOOLS)
    calls = [it for it in first.output if it.type == "function_call"]
    results = [{"type": "function_call_output", "call_id": it.call_id, "output": "20"} for it in calls]
    server.says("It is 20.")
    items: Any = [{"role": "user", "content": ASKED["input"]}, *first.output, *results]
    second = client.responses.create(**WITH_TOOLS | {"input": items})
    assert second.output_text == "It is 20." and [it.type for it in second.output] == ["message"]
    added = "<think>Hm.</think>I ask." + LYON + NOW + "tool: 20tool: 20"
    assert first.usage is not None and second.usage is not None
    assert second.usage.input_tokens - first.usage.input_tokens >= len(added)
    counted = client.responses.input_tokens.count(model="tiny", input=items, tools=WITH_TOOLS["tools"])
    assert counted.input_tokens == second.usage.input_tokens


def test_openais_client_parses_what_it_asked_for(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.says(f"<think>Hm.</think>{WARM}")
    answer = client.responses.parse(model="tiny", input="Well?", text_format=Weather, max_output_tokens=200)
    assert answer.output_parsed == Weather(city="Lyon", is_warm=True)
    (source,) = server.grammars.seen
    assert (source.kind, source.param) == ("json_schema", "text") and "think" in source.before
    assert set(json.loads(source.text)["properties"]) == {"city", "is_warm"}
    assert answer.text is not None and answer.text.format is not None and answer.text.format.type == "json_schema"
    again: Any = [{"role": "user", "content": "Well?"}, *answer.output, {"role": "user", "content": "Well?"}]
    assert client.responses.create(model="tiny", input=again, max_output_tokens=200).output_text == WARM


def test_openais_client_streams_calls_and_parses_them(client: openai.OpenAI, server: ScriptedServer) -> None:
    class Place(BaseModel):
        city: str

    server.says(f"<think>Hm.</think>I ask.{LYON}")
    tool: Any = openai.pydantic_function_tool(Place, name="weather")
    with client.responses.stream(model="tiny", input="Well?", tools=[tool], max_output_tokens=300) as stream:
        seen = list(stream)
        final = stream.get_final_response()
    assert [it.type for it in final.output] == ["reasoning", "message", "function_call"]
    call = final.output[2]
    assert call.type == "function_call" and call.parsed_arguments == Place(city="Lyon")
    assert sum(it.type == "response.function_call_arguments.delta" for it in seen) > 10
    (source,) = server.grammars.seen  # its tool is strict
    assert source.kind == "lark"
    items: Any = [{"role": "user", "content": "Well?"}, *final.output,
                  {"type": "function_call_output", "call_id": call.call_id, "output": "20"}]  # fmt: skip
    server.says("Warm.")
    assert client.responses.create(model="tiny", input=items, max_output_tokens=20).output_text == "Warm."


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "name": "time"},
               {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "time"}]}]
)  # fmt: skip
def test_who_must_call_is_held_to_it(http: httpx.Client, server: ScriptedServer, choice: Any) -> None:
    server.says(NOW)
    answer = whole(http, WITH_TOOLS | {"tool_choice": choice})
    assert [it["type"] for it in answer["output"]] == ["function_call"] and answer["tool_choice"] == choice
    (source,) = server.grammars.seen
    assert (source.kind, source.param) == ("lark", "tools")
    assert ("weather" in source.text) == (choice == "required") and "time" in source.text


def test_a_call_that_is_cut_is_not_whole(http: httpx.Client, server: ScriptedServer) -> None:
    server.says(LYON)
    answer = whole(http, WITH_TOOLS | {"max_output_tokens": 55})
    (call,) = answer["output"]
    assert call["status"] == answer["status"] == "incomplete" and '{"city": "Lyon"}'.startswith(call["arguments"])


def test_vllms_fields_say_what_a_response_must_spell_too(http: httpx.Client, server: ScriptedServer) -> None:
    server.says("yes")
    whole(http, ASKED | {"structured_outputs": {"choice": ["yes", "no"]}})
    assert [(it.kind, it.param) for it in server.grammars.seen] == [("choice", "structured_outputs")]


def test_plain_requests_have_nothing_compiled(http: httpx.Client, server: ScriptedServer) -> None:
    server.says("Warm.")
    answer = whole(http, ASKED | {"text": {"format": {"type": "text"}}, "tools": []})
    assert [it["type"] for it in answer["output"]] == ["message"] and server.grammars.seen == []


@pytest.mark.parametrize(
    ("more", "added"),
    [("{% if enable_thinking is defined %}thinks: {{ enable_thinking }}{% endif %}", "thinks: False"),
     ("{{ reasoning_effort }}", "none"), ("", None)],
)  # fmt: skip
def test_no_effort_is_no_reasoning(
    http: httpx.Client, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, more: str, added: str | None
) -> None:
    (server.root / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE + more}))
    monkeypatch.setattr(server.service, "texts", AdapterTexts(Text.load(server.root / "model")))
    server.says("Warm.")
    answer = http.post("/v1/responses", json=ASKED | {"reasoning": {"effort": "none"}})
    if added is None:
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "reasoning") and "always has" in error["message"]
        return
    counts = [it.json()["usage"]["input_tokens"] for it in (http.post("/v1/responses", json=ASKED), answer)]
    assert counts[1] - counts[0] == len(added)
