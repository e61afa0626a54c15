"""Tools, calls and results in bodies: what is read of them, and what is refused by name."""

import json
import time
from typing import Any

import pytest

from server.api.generating.chat import conversation
from server.api.protocol.body import BodyLimits
from server.api.protocol.chat import ChatBody
from server.api.protocol.json_text import MAX_NESTED
from server.api.protocol.tokens import TokenizeBody
from server.api.texts.speech import Tool, ToolsWanted
from server.api.transport.bodies import validated
from server.errors import InvalidRequest

LIMITS = BodyLimits(max_model_len=100, vocab_size=100, max_prompts=2, max_n=2, max_stop=2, max_stop_chars=3,
                    max_messages=2000, max_parts=2000, max_logprobs=5, max_tools=3)  # fmt: skip
USER = {"role": "user", "content": "x"}
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}}


def function(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | fields}


def read(*messages: Any, **fields: Any) -> ChatBody:
    return validated(ChatBody, {"model": "m", "messages": list(messages) or [USER]} | fields, LIMITS)


def wanted(**fields: Any) -> ToolsWanted | None:
    return read(**fields).tools_wanted


def refused(*messages: Any, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refusal:
        read(*messages, **fields)
    assert len(refusal.value.message) < 400
    return refusal.value


# -- tools ---


def test_tools_are_read_as_they_are_meant() -> None:
    tools = [function("a", description="b", parameters=PLACE, strict=True), function("c"), function("d", parameters={})]
    nothing = {"type": "object", "properties": {}}
    assert wanted(tools=tools) == ToolsWanted(
        [Tool("a", "b", PLACE, True), Tool("c", None, nothing), Tool("d", None, nothing)]
    )


@pytest.mark.parametrize(
    ("fields", "is_wanted"),
    [
        ({"tool_choice": "auto"}, ToolsWanted((), False)),
        ({"tool_choice": "required"}, ToolsWanted((), True)),
        ({"parallel_tool_calls": False}, ToolsWanted((), parallel=False)),
        ({"parallel_tool_calls": True, "tool_choice": None}, ToolsWanted(())),
        ({"tool_choice": function("b")}, ToolsWanted((), True, frozenset({"b"}), parallel=False)),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function("b")]}}},
         ToolsWanted((), False, frozenset({"b"}))),
        ({"tool_choice": {"type": "allowed_tools",
                          "allowed_tools": {"mode": "required", "tools": [function("b"), function("a")]}}},
         ToolsWanted((), True, frozenset({"a", "b"}))),
    ],
)  # fmt: skip
def test_a_choice_says_who_must_call_what(fields: dict[str, Any], is_wanted: ToolsWanted) -> None:
    made = wanted(tools=[function("a"), function("b")], **fields)
    assert made is not None
    assert (made.must_call, made.only, made.parallel) == (is_wanted.must_call, is_wanted.only, is_wanted.parallel)


@pytest.mark.parametrize(
    "fields",
    [{}, {"tools": []}, {"tools": None}, {"tool_choice": "none"}, {"tool_choice": "auto"},
     {"parallel_tool_calls": False},     {"tools": [function()], "tool_choice": "none"}],
)  # fmt: skip
def test_where_nothing_can_be_called_nobody_is_told_of_tools(fields: dict[str, Any]) -> None:
    body = read(**fields)
    assert body.tools_wanted is None and conversation(body).tools == ()


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tools": "f"}, "tools", "list"),
        ({"tools": [1]}, "tools", "tools"),
        ({"tools": [{}]}, "tools", "type: Field required"),
        ({"tools": [{"type": "function"}]}, "tools", "function: Field required"),
        ({"tools": [{"type": "web_search"}]}, "tools", "of type 'web_search' is not served; function is"),
        ({"tools": [function() | {"name": "f"}]}, "tools", "'name' is not a field of tools"),
        ({"tools": [{"type": "function", "name": "f"}]}, "tools",
         '\'name\' is not a field of tools, where {"type": "function", "function": {"name": …, "description": …,'),
        ({"tools": [{"name": "f", "input_schema": {}}]}, "tools", 'where {"type": "function", "function": {"name"'),
        ({"tools": [function(extra=1)]}, "tools", "'extra' is not a field of tools.function"),
        ({"tools": [function() | {"function": 1}]}, "tools", "tools.0.function: Input should be an object"),
        ({"tools": ["f"]}, "tools", 'in tools an object is expected: {"type": "function"'),
        ({"tools": [function("a b")]}, "tools", "name"),
        ({"tools": [function("a" * 65)]}, "tools", "name"),
        ({"tools": [function(parameters=[])]}, "tools", "the schema in tools must be a JSON object"),
        ({"tools": [function(parameters={"minimum": 1e999})]}, "tools", "too large"),
        ({"tools": [function(), function()]}, "tools", "two tools have the name 'f'"),
        ({"tools": [function(f"f{it}") for it in range(4)]}, "tools", "4 tools; at most 3 are served"),
        ({"tool_choice": "required"}, "tool_choice", "asks for a call, and there are no tools"),
        ({"tool_choice": function()}, "tool_choice", "no tools"),
        ({"tools": [], "tool_choice": function()}, "tool_choice", "no tools"),
        ({"tools": [function()], "tool_choice": "any"}, "tool_choice",
         'must be "none", "auto", "required" or {"type": "function", "function": {"name": …}}'),
        ({"tools": [function()], "tool_choice": 5}, "tool_choice", "tool_choice must be"),
        ({"tools": [function()], "tool_choice": "f"}, "tool_choice", "tool_choice must be"),
        ({"tools": [function()], "tool_choice": {}}, "tool_choice", "tool_choice.type: Field required"),
        ({"tools": [function()], "tool_choice": {"function": {"name": "f"}}}, "tool_choice",
         "tool_choice.type: Field required"),
        ({"tools": [function()], "tool_choice": {"type": "function", "function": {}}}, "tool_choice",
         "tool_choice.function.name: Field required"),
        ({"tools": [function()], "tool_choice": {"type": "custom"}}, "tool_choice", "of type 'custom' is not served"),
        ({"tools": [function()], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice", "'name' is not a"),
        ({"tools": [function("a"), function("b")], "tool_choice": function("c")}, "tool_choice",
         "names 'c', which is none of the tools: a, b"),
        ({"tools": [function()], "tool_choice": {
            "type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}, "tool_choice", "at least 1"),
        ({"tools": [function()], "tool_choice": {
            "type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function("g")]}}},
         "tool_choice", "names 'g'"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "boolean"),
        ({"functions": [{"name": "f"}]}, "functions", "functions is not served"),
        ({"function_call": "auto"}, "function_call", "function_call is not served"),
    ],
)  # fmt: skip
def test_tools_that_are_not_served_are_refused_by_name(fields: dict[str, Any], param: str, says: str) -> None:
    refusal = refused(**fields)
    assert refusal.param == param and says in refusal.message, refusal.message


# -- calls and results ---


def call(id: str = "1", name: str = "f", arguments: str = "{}", **fields: Any) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}} | fields


def called(*calls: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)} | fields


def result(id: str = "1", **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": "y"} | fields


def test_calls_and_their_results_are_told_as_templates_read_them() -> None:
    calls = called(call(arguments='{"a": [1, {"b": null}]}'), call("2", "g", ""), reasoning_content="hm", refusal=None,
                   annotations=[], function_call=None)  # fmt: skip
    del calls["content"]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    told = conversation(read(USER, calls, result("2", content=parts), result(name="f"), USER)).messages
    assert told[1] == {
        "role": "assistant", "content": "", "reasoning_content": "hm",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, {"b": None}]}}},
            {"id": "2", "type": "function", "function": {"name": "g", "arguments": {}}},
        ],
    }  # fmt: skip
    assert told[2] == {"role": "tool", "content": "ab", "tool_call_id": "2", "name": "g"}
    assert told[3] == {"role": "tool", "content": "y", "tool_call_id": "1", "name": "f"}


@pytest.mark.parametrize(
    "arguments", ["[1]", "{city: Lyon}", '{"city": "Ly', "x", '{"a": NaN}', '{"a": 1e999}', '{"a": "\\ud800"}', " "]
)
def test_a_call_that_was_answered_with_goes_back_whatever_a_model_wrote(arguments: str) -> None:
    told = conversation(read(USER, called(call(arguments=arguments)), result(content="that was no JSON"))).messages
    assert told[1]["tool_calls"][0]["function"]["arguments"] == {"INVALID_JSON": arguments}


def test_what_clients_make_of_an_answer_may_come_back_with_it() -> None:
    made = call(index=0)
    made["function"]["parsed_arguments"] = {"a": 1}
    read(USER, called(made, content="", parsed={"b": 2}), result())


def test_only_the_last_assistants_calls_are_answered() -> None:
    read(USER, called(call()), result(), called(call()), result(), result())
    says = "the call '1' is answered, and the assistant's turn before made no such call"
    assert says in refused(USER, called(call()), called(call("2")), result("1")).message


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([result()], "the call '1' is answered"),
        ([USER, called(call()), result("2")], "the call '2' is answered"),
        ([USER, called(call()), result("x" * 1000)], "the call 'xxx"),
        ([USER, called(call()), result(content=20)], "content in messages must be a text, or a list of parts"),
        ([USER, called(call()), result(content={"a": 1})], "send its text, of an object json.dumps(...)"),
        ([USER | {"content": [{"type": "text"}]}], "messages.0.content.0.text: Field required"),
        ([USER | {"content": ["x"]}], "messages.0.content.0: Input should be an object"),
        ([USER, called(call()), result(tool_call_id=None)], "a message of the role tool needs tool_call_id"),
        ([USER, called(call()), result(tool_call_id="")], "a message of the role tool needs tool_call_id"),
        ([USER, called(call()), result(content=None)], "a message of the role tool needs content"),
        ([USER, called(call()), result(name="g")], "has the name 'g', and the call was of 'f'"),
        ([USER, called(call()), result(content=[{"type": "image_url"}])], "'image_url' in messages is not served"),
        ([USER, called(call(), call())], "two calls in one turn have the id '1'"),
        ([USER, called()], "a message of the role assistant needs content"),
        ([{"role": "user"}], "a message of the role user needs content"),
        ([USER | {"tool_calls": [call()]}], "tool_calls in a message of the role user is not served"),
        ([USER | {"tool_call_id": "1"}], "tool_call_id in a message of the role user is not served"),
        ([USER | {"name": "n"}], "name in a message of the role user is not served"),
        ([USER | {"parsed": {"a": 1}}], "parsed in a message of the role user is not served"),
        ([USER | {"reasoning_content": "r"}], "only assistants reason"),
        ([USER, called(call(), reasoning="r")], "reasoning in messages is not served; send reasoning_content"),
        ([USER, called(call()), result(reasoning_content="r")], "only assistants reason"),
        ([USER, called(call(type="custom"))], "a call of type 'custom' in messages is not served"),
        ([USER, called({"id": "1", "type": "function"})], "function: Field required"),
        ([USER, called(call(id=""))], "id"),
        ([USER, called(call(extra=1))], "'extra' is not a field of messages"),
        ([USER, called(1)], "tool_calls"),
        ([USER, called(call(arguments='{"a":' * 50_000))], "arguments of calls in messages has 50,000 lists and"),
        ([USER, called(call(arguments='{"a":' * 9_000))], "more than 64 deep"),
        ([USER, called(call(arguments='{"a":' * 65 + "1" + "}" * 65))], "more than 64 deep"),
    ],
)  # fmt: skip
def test_conversations_that_make_no_sense_are_refused(messages: list[Any], says: str) -> None:
    refusal = refused(*messages)
    assert refusal.param == "messages" and says in refusal.message, refusal.message


def test_a_turn_that_calls_cannot_be_continued() -> None:
    assert refused(USER, called(call()), continue_final_message=True).param == "continue_final_message"


def test_what_is_too_much_holds_nobody_up() -> None:
    half = '{"a":[' + "[]," * (MAX_NESTED // 2) + "[]]}"
    hostile: list[dict[str, Any]] = [
        {"tools": [function(f"f{it}") for it in range(100_000)]},
        {"messages": [USER, called(*(call(str(it)) for it in range(100_000)))]},
        {"messages": [USER, called(call(arguments=half), call("2", arguments=half))]},
        {"messages": [USER, called(call(arguments="{}"), *[1] * 1500)]},
        {"messages": [result(str(it)) for it in range(1500)]},
        {"tools": [function()], "tool_choice": {"type": "allowed_tools", "allowed_tools": {
            "mode": "auto", "tools": [1] * 100_000}}},
    ]  # fmt: skip
    for fields in hostile:
        start = time.process_time()
        refused(**fields)
        assert time.process_time() - start < 0.5


def test_code_in_arguments_is_not_counted_as_structure() -> None:
    read(USER, called(call(arguments=json.dumps({"code": "{[]}\n" * 20_000}))), result())


# -- /tokenize ---


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": "x", "tools": [function()]}, "tools says nothing about a prompt"),
        ({"messages": [USER], "tools": [function(), function()]}, "two tools have the name"),
        ({"messages": [result()]}, "is answered"),
    ],
)
def test_tokens_are_counted_of_what_chat_takes(fields: dict[str, Any], says: str) -> None:
    validated(TokenizeBody, {"messages": [USER], "tools": [function()]}, LIMITS)
    with pytest.raises(InvalidRequest) as refusal:
        validated(TokenizeBody, fields, LIMITS)
    assert says in refusal.value.message
