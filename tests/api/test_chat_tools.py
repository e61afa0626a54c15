"""Calls of tools, reasoning and structured output, as chat words them and OpenAI's client reads them."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from server.grammars.source import GrammarSource
from tests.support.scripted_server import ScriptedServer
from tests.support.served import events
from tests.support.waiting import eventually

MESSAGES: list[Any] = [{"role": "user", "content": "How warm is it in Lyon?"}]
WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "Of now.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}}  # fmt: skip
TIME = {"type": "function", "function": {"name": "time"}}
LYON = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lyon"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
ASKED: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 300}
WITH_TOOLS: dict[str, Any] = ASKED | {"tools": [WEATHER, TIME]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    with ScriptedServer(tmp_path_factory.mktemp("scripted")).running() as it:
        yield it


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
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def deltas(http: httpx.Client, body: dict[str, Any]) -> list[Any]:
    """The choices of all chunks."""
    with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200
        return [choice for it in events(answer.iter_lines()) for choice in it["choices"]]


def put_together(choices: list[Any]) -> dict[str, Any]:
    """The message that the chunks of one choice come to."""
    message: dict[str, Any] = {"role": choices[0]["delta"]["role"], "content": "", "reasoning": "", "calls": []}
    for it in choices:
        message["content"] += it["delta"].get("content", "")
        message["reasoning"] += it["delta"].get("reasoning_content", "")
        for call in it["delta"].get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(message["calls"]) and call["type"] == "function"
                message["calls"].append({"id": call["id"], "name": call["function"]["name"], "arguments": ""})
            else:
                assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
            message["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return message


# -- calls ---


def test_a_call_is_a_call_and_not_text(http: httpx.Client, server: ScriptedServer) -> None:
    server.says(LYON)
    answer = whole(http, WITH_TOOLS)
    (choice,) = answer["choices"]
    message = choice["message"]
    assert message["content"] is None and "reasoning_content" not in message and choice["finish_reason"] == "tool_calls"
    (call,) = message["tool_calls"]
    assert call["id"] and call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Lyon"}'}
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    assert server.grammars.seen == []  # nothing is asked of the text


def test_without_calls_there_are_none(http: httpx.Client, server: ScriptedServer) -> None:
    server.says("It is warm.")
    (choice,) = whole(http, WITH_TOOLS)["choices"]
    assert choice["message"] == {"role": "assistant", "content": "It is warm.", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_a_stream_tells_the_same(http: httpx.Client, server: ScriptedServer) -> None:
    server.says(f"<think>\nWhere is it?\n</think>\n\nI ask.\n{LYON}\n{NOW}")
    (choice,) = whole(http, WITH_TOOLS)["choices"]
    streamed = deltas(http, WITH_TOOLS)
    message = put_together(streamed)
    assert message["content"] == choice["message"]["content"] == "I ask."
    assert message["reasoning"] == choice["message"]["reasoning_content"] == "Where is it?"
    told = [(it["function"]["name"], it["function"]["arguments"]) for it in choice["message"]["tool_calls"]]
    assert [(it["name"], it["arguments"]) for it in message["calls"]] == told
    assert told == [("weather", '{"city": "Lyon"}'), ("time", "{}")]
    assert len({it["id"] for it in message["calls"]}) == 2
    assert [it["finish_reason"] for it in streamed] == [None] * (len(streamed) - 1) + ["tool_calls"]
    assert streamed[0]["delta"] == {"role": "assistant", "content": ""}
    assert all(it["delta"] for it in streamed[:-1])  # no chunk says nothing
    assert sum(bool(it["delta"].get("tool_calls")) for it in streamed) > 10  # arguments come as they are made


def test_texts_on_both_sides_of_a_call_are_lines_of_one_content(http: httpx.Client, server: ScriptedServer) -> None:
    server.says(f"Sure! {LYON}\n\nAnything else?")
    (choice,) = whole(http, WITH_TOOLS)["choices"]
    assert put_together(deltas(http, WITH_TOOLS))["content"] == choice["message"]["content"] == "Sure!\nAnything else?"


def test_reasoning_alone_leaves_an_empty_content(http: httpx.Client, server: ScriptedServer) -> None:
    server.says("<think>Hm.</think>")
    (choice,) = whole(http, WITH_TOOLS)["choices"]
    assert put_together(deltas(http, WITH_TOOLS))["content"] == choice["message"]["content"] == ""


@pytest.mark.parametrize(
    ("says", "most"), [(LYON.replace('{"city": "Lyon"}', "{city: Lyon}"), 300), (LYON, 60)], ids=["broken", "cut"]
)
def test_an_answer_goes_back_as_it_came(http: httpx.Client, server: ScriptedServer, says: str, most: int) -> None:
    server.says(says)
    message = whole(http, WITH_TOOLS | {"max_tokens": most})["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": it["id"], "content": "no JSON"} for it in message["tool_calls"]]
    server.says("I see.")
    answer = whole(http, WITH_TOOLS | {"messages": [*ASKED["messages"], message, *results]})
    assert answer["choices"][0]["message"]["content"] == "I see."


def test_each_completion_has_its_own_calls(http: httpx.Client, server: ScriptedServer) -> None:
    server.says("Warm.", LYON, f"{NOW}\n{NOW}")
    told = whole(http, WITH_TOOLS | {"n": 3})["choices"]
    assert [it["finish_reason"] for it in told] == ["stop", "tool_calls", "tool_calls"]
    assert [len(it["message"].get("tool_calls", ())) for it in told] == [0, 1, 2]
    streamed = deltas(http, WITH_TOOLS | {"n": 3})
    messages = [put_together([it for it in streamed if it["index"] == index]) for index in range(3)]
    assert [[call["name"] for call in it["calls"]] for it in messages] == [[], ["weather"], ["time", "time"]]
    assert len({call["id"] for it in messages for call in it["calls"]}) == 3


def test_a_call_that_is_cut_ends_for_length(http: httpx.Client, server: ScriptedServer) -> None:
    server.says(LYON)
    (choice,) = whole(http, WITH_TOOLS | {"max_tokens": 55})["choices"]
    assert choice["finish_reason"] == "length"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather" and '{"city": "Lyon"}'.startswith(call["function"]["arguments"])


def test_a_stop_string_ends_an_answer_with_tools_as_any_other(http: httpx.Client, server: ScriptedServer) -> None:
    server.says("It is warm. Quite.")
    (choice,) = whole(http, WITH_TOOLS | {"stop": ". "})["choices"]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == (
        "It is warm",
        "stop",
        ". ",
    )


def test_with_tool_choice_none_a_model_knows_of_no_tools(http: httpx.Client, server: ScriptedServer) -> None:
    server.says(LYON)
    without, none = whole(http, ASKED), whole(http, WITH_TOOLS | {"tool_choice": "none"})
    assert none["choices"][0]["message"]["content"] == without["choices"][0]["message"]["content"] == LYON
    assert none["usage"]["prompt_tokens"] == without["usage"]["prompt_tokens"]
    assert whole(http, WITH_TOOLS)["usage"]["prompt_tokens"] > none["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "weather"}},
     {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TIME]}}],
)  # fmt: skip
def test_who_must_call_is_held_to_it(http: httpx.Client, server: ScriptedServer, choice: Any) -> None:
    server.says(LYON)
    tools = [WEATHER, {"type": "function", "function": {"name": "time"}}]
    if isinstance(choice, dict) and "allowed_tools" in choice:
        choice = {"type": "allowed_tools", "allowed_tools": {
            "mode": "required", "tools": [{"type": "function", "function": {"name": "time"}}]}}  # fmt: skip
    whole(http, WITH_TOOLS | {"tools": tools, "tool_choice": choice})
    (source,) = server.grammars.seen
    assert (source.kind, source.param) == ("lark", "tools")
    named = [name for name in ("weather", "time") if f'\\"{name}\\"' in source.text or f'"{name}"' in source.text]
    assert named == (["weather", "time"] if choice == "required" else ["weather"] if "function" in choice else ["time"])


def test_without_parallel_calls_there_is_one(http: httpx.Client, server: ScriptedServer) -> None:
    server.says(f"I ask.{LYON}\n{NOW}")
    (choice,) = whole(http, WITH_TOOLS | {"parallel_tool_calls": False})["choices"]
    assert choice["message"]["content"] == "I ask." and choice["finish_reason"] == "tool_calls"
    assert [it["function"]["name"] for it in choice["message"]["tool_calls"]] == ["weather"]


def test_none_but_an_allowed_tool_is_called_even_where_none_need_be(http: httpx.Client, server: ScriptedServer) -> None:
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "time"}}]}
    body = WITH_TOOLS | {"tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}}
    server.says(LYON)
    (choice,) = whole(http, body)["choices"]
    assert [it["function"]["name"] for it in choice["message"].get("tool_calls", ())] in ([], ["time"])
    server.says("Warm.")
    assert whole(http, body)["choices"][0]["message"]["content"] == "Warm."


def test_a_conversation_goes_on_behind_its_calls(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.says(f"<think>Hm.</think>{LYON}\n{NOW}")
    messages = list(MESSAGES)
    tools: Any = [WEATHER, TIME]
    first = client.chat.completions.create(model="tiny", messages=messages, tools=tools, max_tokens=300)
    messages.append(first.choices[0].message)
    calls = first.choices[0].message.tool_calls
    assert calls is not None and len(calls) == 2
    messages += [{"role": "tool", "tool_call_id": it.id, "content": "20"} for it in calls]
    server.says("It is 20.")
    second = client.chat.completions.create(model="tiny", messages=messages, tools=tools)
    assert second.choices[0].message.content == "It is 20." and second.choices[0].message.tool_calls is None
    assert first.usage is not None and second.usage is not None
    added = "<think>Hm.</think>" + LYON + NOW + "tool: 20tool: 20"
    assert second.usage.prompt_tokens - first.usage.prompt_tokens >= len(added)


# -- reasoning ---


def test_reasoning_is_told_apart_and_counted(http: httpx.Client, server: ScriptedServer) -> None:
    server.says("<think>\nLyon is far.\n</think>\n\nWarm.")
    answer = whole(http, ASKED)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Lyon is far.", "Warm.")
    reasoning = answer["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert len("Lyon is far.") <= reasoning <= len("\nLyon is far.\n</think>\n\n")
    hidden = whole(http, ASKED | {"include_reasoning": False})
    assert hidden["choices"][0]["message"] == {"role": "assistant", "content": "Warm.", "refusal": None}
    assert hidden["usage"] == answer["usage"] | {"prompt_tokens_details": hidden["usage"]["prompt_tokens_details"]}


def test_a_stream_without_reasoning_says_nothing_of_it(http: httpx.Client, server: ScriptedServer) -> None:
    server.says("<think>\nLyon is far.\n</think>\n\nWarm.")
    told, hidden = deltas(http, ASKED), deltas(http, ASKED | {"include_reasoning": False})
    assert put_together(told)["reasoning"] == "Lyon is far."
    assert put_together(hidden) == {"role": "assistant", "content": "Warm.", "reasoning": "", "calls": []}
    assert all(it["delta"] for it in hidden[:-1])


def test_an_answer_that_is_cut_in_its_reasoning_has_no_content(http: httpx.Client, server: ScriptedServer) -> None:
    server.says("<think>Lyon is far.</think>Warm.")
    (choice,) = whole(http, ASKED | {"max_tokens": 12})["choices"]
    assert choice["message"]["content"] == "" and choice["finish_reason"] == "length"
    assert "Lyon is far.".startswith(choice["message"]["reasoning_content"])


@pytest.mark.parametrize("says", ["<think>Far.</think>Warm.", f"So:\n{LYON}", "Warm."])
def test_log_probabilities_are_told_of_every_token(http: httpx.Client, server: ScriptedServer, says: str) -> None:
    server.says(says)
    body = WITH_TOOLS | {"logprobs": True}
    (choice,) = whole(http, body)["choices"]
    entries = choice["logprobs"]["content"]
    assert "".join(it["token"] for it in entries) == says
    assert [entry for it in deltas(http, body) for entry in it["logprobs"]["content"]] == entries
    hidden = deltas(http, body | {"include_reasoning": False})
    assert [entry for it in hidden for entry in it["logprobs"]["content"]] == entries


# -- structured output ---


class Weather(BaseModel):
    city: str
    sky: Literal["clear", "cloudy"]


WARM = '{"city": "Lyon", "sky": "clear"}'


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's, of what it has made itself
def test_openais_client_parses_what_it_asked_for(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.says(WARM)
    answer = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=Weather, max_tokens=200)
    assert answer.choices[0].message.parsed == Weather(city="Lyon", sky="clear")
    (source,) = server.grammars.seen
    schema = json.loads(source.text)
    assert (source.kind, source.param) == ("json_schema", "response_format")
    assert set(schema["properties"]) == {"city", "sky"} and schema["additionalProperties"] is False
    assert "think" in source.before and source.instead == ""
    again = client.chat.completions.create(
        model="tiny", messages=[*MESSAGES, answer.choices[0].message, *MESSAGES], max_tokens=200
    )  # with what the client has made of it
    assert again.choices[0].message.content == WARM


def test_openais_client_streams_calls_and_parses_them(client: openai.OpenAI, server: ScriptedServer) -> None:
    server.says(f"<think>Hm.</think>I ask.{LYON}\n{NOW}")

    class Place(BaseModel):
        city: str

    class Nothing(BaseModel):
        pass

    tools: Any = [
        openai.pydantic_function_tool(Place, name="weather"),
        openai.pydantic_function_tool(Nothing, name="time"),
    ]
    seen: list[Any] = []
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, tools=tools, max_tokens=300) as stream:
        seen = list(stream)
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert message.content == "I ask." and final.choices[0].finish_reason == "tool_calls"
    assert message.tool_calls is not None
    assert [it.function.parsed_arguments for it in message.tool_calls] == [Place(city="Lyon"), Nothing()]
    assert sum(it.type == "tool_calls.function.arguments.delta" for it in seen) > 10
    assert [it.name for it in seen if it.type == "tool_calls.function.arguments.done"] == ["weather", "time"]
    (source,) = server.grammars.seen  # its tools are strict
    assert source.kind == "lark"
    results: list[Any] = [{"role": "tool", "tool_call_id": it.id, "content": "20"} for it in message.tool_calls]
    server.says("Warm.")
    again = client.chat.completions.create(model="tiny", messages=[*MESSAGES, message, *results], max_tokens=200)
    assert again.choices[0].message.content == "Warm."


def test_a_form_and_tools_leave_both_ways_open(http: httpx.Client, server: ScriptedServer) -> None:
    server.says(WARM)
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": Weather.model_json_schema()}}
    whole(http, WITH_TOOLS | {"response_format": form})
    (source,) = server.grammars.seen
    assert source.kind == "json_schema" and "weather" in source.instead


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        ({"structured_outputs": {"regex": "[a-z]+"}}, "regex", "[a-z]+"),
        ({"guided_choice": ["yes", "no"]}, "choice", '["yes", "no"]'),
        ({"guided_grammar": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
    ],
)
def test_both_routes_serve_every_kind(
    http: httpx.Client, server: ScriptedServer, route: str, fields: dict[str, Any], kind: str, text: str
) -> None:
    server.says("no")
    asked = ASKED if "chat" in route else {"model": "tiny", "prompt": ["a", "b"], "n": 2, "best_of": 3}
    answer = http.post(f"/v1/{route}", json=asked | fields)
    assert answer.status_code == 200, answer.text
    (source,) = server.grammars.seen  # compiled once, however many completions there are
    assert (source.kind, source.text, source.param) == (kind, text, next(iter(fields)))


@pytest.mark.parametrize("fields", [{"guided_regex": "a"}, {"tools": [WEATHER], "tool_choice": "required"}])
def test_what_must_end_cannot_go_on_for_ever(http: httpx.Client, fields: dict[str, Any]) -> None:
    answer = http.post("/v1/chat/completions", json=ASKED | fields | {"ignore_eos": True})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "ignore_eos"
    server_says = answer.json()["error"]["message"]
    assert next(iter(fields)) in server_says


def test_plain_requests_have_nothing_compiled(http: httpx.Client, server: ScriptedServer) -> None:
    server.says("Warm.")
    whole(http, ASKED | {"response_format": {"type": "text"}})
    assert server.grammars.seen == []


def test_who_leaves_while_a_grammar_is_compiled_takes_no_room(server: ScriptedServer) -> None:
    async def never(source: GrammarSource) -> str:
        await asyncio.sleep(60)
        return ""

    with pytest.MonkeyPatch.context() as patch, httpx.Client(base_url=server.url, timeout=0.3) as http:
        patch.setattr(server.grammars, "compiled", never)
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/chat/completions", json=ASKED | {"guided_regex": "a"})
        eventually(lambda: server.in_front(lambda: server.service._admitted) == 0)


# -- tokens ---


def test_tokens_of_a_conversation_with_tools_are_counted_as_a_chat_counts_them(
    http: httpx.Client, server: ScriptedServer
) -> None:
    server.says("Warm.")
    counted = http.post("/tokenize", json={"messages": MESSAGES, "tools": [WEATHER, TIME]}).json()["count"]
    assert counted == whole(http, WITH_TOOLS)["usage"]["prompt_tokens"]
