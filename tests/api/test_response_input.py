"""Items of /v1/responses, its tools and its formats: what is read of them, and what is refused by name."""

from typing import Any

import pytest

from server.api.generating.responses import conversation
from server.api.protocol.body import BodyLimits
from server.api.protocol.responses import ResponseBody
from server.api.texts.speech import Tool, ToolsWanted
from server.api.transport.bodies import validated
from server.errors import InvalidRequest

LIMITS = BodyLimits(max_model_len=100, vocab_size=100, max_prompts=2, max_n=2, max_stop=2, max_stop_chars=3,
                    max_messages=20, max_parts=10, max_logprobs=5, max_tools=3)  # fmt: skip
USER = {"role": "user", "content": "x"}
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}}


def function(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "name": name} | fields


def message(text: str, **fields: Any) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]} | fields


def call(call_id: str = "a", arguments: str = "{}", **fields: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": f"f_{call_id}", "arguments": arguments} | fields


def output(call_id: str = "a", text: Any = "done", **fields: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": text} | fields


def reasoning(text: str = "Hm.", **fields: Any) -> dict[str, Any]:
    return {"type": "reasoning", "id": "rs_1", "summary": [],
            "content": [{"type": "reasoning_text", "text": text}]} | fields  # fmt: skip


def read(*items: Any, **fields: Any) -> ResponseBody:
    return validated(ResponseBody, {"model": "m", "input": list(items) or "x"} | fields, LIMITS)


def refused(*items: Any, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refusal:
        read(*items, **fields)
    assert len(refusal.value.message) < 400
    return refusal.value


# -- items ---


def said_of(id: str, arguments: Any = None) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": f"f_{id}", "arguments": arguments or {}}}


def result(id: str, text: str = "done") -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": id, "name": f"f_{id}"}


def test_what_an_answer_sent_back_is_one_turn() -> None:
    parts = [{"type": "input_text", "text": "it "}, {"type": "input_text", "text": "is"}]
    body = read(USER, reasoning(), message("Let me."), call("a", '{"x": [1]}', id="fc_1", status="completed"),
                call("b", ""), output("b", parts, id="fco_1"), output("a"), message("So."), USER)  # fmt: skip
    assert body.said == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "Let me.", "reasoning_content": "Hm.",
         "tool_calls": [said_of("a", {"x": [1]}), said_of("b")]},
        result("b", "it is"), result("a"),
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "x"},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("items", "turns"),
    [
        ([message("a"), message("b")], [{"content": "a"}, {"content": "b"}]),
        ([call(), message("b")], [{"content": "b", "tool_calls": [said_of("a")]}]),
        ([reasoning(), call(), reasoning("So."), call("b")],
         [{"content": "", "reasoning_content": "Hm.\nSo.", "tool_calls": [said_of("a"), said_of("b")]}]),
        ([message("a"), reasoning(), call()],
         [{"content": "a"}, {"content": "", "reasoning_content": "Hm.", "tool_calls": [said_of("a")]}]),
        ([reasoning()], [{"content": "", "reasoning_content": "Hm."}]),
        ([reasoning(content=None), message("a")], [{"content": "a"}]),
    ],
)  # fmt: skip
def test_which_items_are_one_turn(items: list[Any], turns: list[dict[str, Any]]) -> None:
    assert read(USER, *items).said[1:] == [{"role": "assistant"} | it for it in turns]


def test_what_clients_send_with_items_is_taken() -> None:
    """As OpenAI's client, its agents, LangChain and Pydantic AI send answers back."""
    text = {"type": "output_text", "text": "a", "annotations": [], "logprobs": [], "parsed": {"city": "Lyon"}}
    body = read(
        USER, reasoning(encrypted_content=None, status="completed"), message("", content=[text], id="msg_1"),
        call(parsed_arguments={"city": "Lyon"}, caller={"type": "direct"}, namespace=None), output(status="completed"),
        include=["reasoning.encrypted_content"], truncation="disabled", store=False, metadata={},
    )  # fmt: skip
    assert [it["role"] for it in body.said] == ["user", "assistant", "tool"]


@pytest.mark.parametrize("arguments", ["[1]", "{city: Lyon}", '{"a": tru'])
def test_a_call_that_was_answered_with_goes_back_whatever_a_model_wrote(arguments: str) -> None:
    told = read(input=[USER, call(arguments=arguments), output()]).said
    assert told[1]["tool_calls"] == [said_of("a", {"INVALID_JSON": arguments})]


@pytest.mark.parametrize(
    ("items", "says"),
    [
        ([output("nope")], "the call 'nope' is answered, and the assistant's turn before made no such call"),
        ([call(), USER, message("a"), output()], "'a' is answered"),
        ([call(), call()], "two calls in one turn have the id 'a'"),
        ([call(arguments='{"a": ' * 70 + "1" + "}" * 70)], "more than 64 deep"),
        ([call(arguments='{"a": ' * 6000 + "1" + "}" * 6000), call("b", '{"a":' * 6000)], "at most 10,000"),
        ([call(), output(text=5)], "output in input must be a text, or a list of parts; of anything else"),
        ([call(), output(text={"a": 1})], "send its text, of an object json.dumps(...)"),
        ([call(), output(text=[{"type": "input_image"}])], "output of type 'input_image' in input is not served"),
        ([call() | {"async": True}], "async in input is not served"),
        ([call(extra=1)], "'extra' is not a field of input"),
        ([call("")], "call_id"),
        ([reasoning(encrypted_content="x")], "encrypted_content in input is not served; nobody here can read it"),
        ([reasoning(summary=[{"type": "summary_text", "text": "x"}])], "summary in input is not served"),
        ([reasoning(content=[{"type": "output_text", "text": "x"}])], "reasoning_text"),
        ([{"type": "web_search_call", "id": "x"}], "an item of type 'web_search_call' in input is not served"),
        ([{"type": "item_reference", "id": "x"}], "send the item itself"),
        ([output()] * 21, "21 messages"),
        ([reasoning(content=[{"type": "reasoning_text", "text": "x"}] * 11)], "11 parts"),
    ],
)  # fmt: skip
def test_other_items_are_refused(items: list[Any], says: str) -> None:
    refusal = refused(*items)
    assert refusal.param == "input" and says in refusal.message, refusal.message


# -- tools ---


def test_tools_are_read_as_they_are_meant_and_told() -> None:
    body = read(tools=[function("a", description="b", parameters=PLACE, strict=True), function("c", parameters=None)])
    nothing = {"type": "object", "properties": {}}
    assert body.tools_wanted == ToolsWanted([Tool("a", "b", PLACE, True), Tool("c", None, nothing)])
    assert conversation(body).tools == body.tools_wanted.tools
    assert body.tools_told == [
        {"type": "function", "name": "a", "description": "b", "parameters": PLACE, "strict": True},
        {"type": "function", "name": "c", "description": None, "parameters": None, "strict": False},
    ]


@pytest.mark.parametrize(
    ("fields", "must", "only", "parallel"),
    [
        ({}, False, None, True),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, False, None, False),
        ({"tool_choice": "required", "max_tool_calls": 1}, True, None, True),
        ({"tool_choice": function("b")}, True, {"b"}, False),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [function("b")]}}, False, {"b"}, True),
        ({"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [function("b"), function("a")]}},
         True, {"a", "b"}, True),
    ],
)  # fmt: skip
def test_a_choice_says_who_must_call_what(fields: Any, must: bool, only: Any, parallel: bool) -> None:
    body = read(tools=[function("a"), function("b")], **fields)
    made = body.tools_wanted
    assert made is not None and (made.must_call, made.only, made.parallel) == (must, only, parallel)
    assert body.choice_told == fields.get("tool_choice", "auto")


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [function()], "tool_choice": "none"}])
def test_where_nothing_can_be_called_nobody_is_told_of_tools(fields: dict[str, Any]) -> None:
    body = read(**fields)
    assert body.tools_wanted is None and conversation(body).tools == ()


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tools": "f"}, "tools", "list"),
        ({"tools": [{"name": "f"}]}, "tools", "type: Field required"),
        ({"tools": [{"type": "web_search"}]}, "tools", "of type 'web_search' is not served; function is"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools",
         '\'function\' is not a field of tools, where {"type": "function", "name": …, "description": …, "parameters"'),
        ({"tools": [function(defer_loading=True)]}, "tools", "defer_loading in tools is not served"),
        ({"tools": [function(parameters=[])]}, "tools", "must be a JSON object"),
        ({"tools": [function(), function()]}, "tools", "two tools have the name 'f'"),
        ({"tools": [function(f"f{it}") for it in range(4)]}, "tools", "4 tools; at most 3 are served"),
        ({"tool_choice": "required"}, "tool_choice", "no tools to call"),
        ({"tool_choice": function()}, "tool_choice", "no tools to call"),
        ({"tools": [function()], "tool_choice": "any"}, "tool_choice",
         'must be "none", "auto", "required" or {"type": "function", "name": …}'),
        ({"tools": [function()], "tool_choice": {"type": "mcp"}}, "tool_choice", "of type 'mcp' is not served"),
        ({"tools": [function()], "tool_choice": function("g")}, "tool_choice", "names 'g'"),
        ({"tools": [function()], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
         "tool_choice", "at least 1"),
    ],
)  # fmt: skip
def test_other_tools_are_refused(fields: dict[str, Any], param: str, says: str) -> None:
    refusal = refused(**fields)
    assert refusal.param == param and says in refusal.message, refusal.message


# -- formats ---


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ({"type": "json_object"}, '{"type":"object"}'),
        ({"type": "json_schema", "name": "w", "schema": PLACE, "strict": True, "description": None},
         '{"type":"object","properties":{"city":{"type":"string"}}}'),
    ],
)  # fmt: skip
def test_a_format_is_what_the_text_must_spell(format: dict[str, Any], text: str) -> None:
    body = read(text={"format": format})
    assert body.source is not None
    assert (body.source.kind, body.source.text, body.source.param) == ("json_schema", text, "text")
    assert body.format_told == format


@pytest.mark.parametrize("text", [None, {}, {"format": None}, {"format": {"type": "text"}, "verbosity": None}])
def test_plain_text_asks_for_nothing(text: Any) -> None:
    body = read(text=text)
    assert body.source is None and body.format_told == {"type": "text"}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"text": {"format": {"type": "grammar"}}}, "of type 'grammar' is not served; text, json_object, json_schema"),
        ({"text": {"format": {"type": "json_schema", "name": "w"}}}, "schema: Field required"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "name: Field required"),
        ({"text": {"format": {"type": "json_schema", "name": "w", "schema": []}}}, "must be a JSON object"),
        ({"text": {"format": {"type": "json_object", "schema": {}}}}, "'schema' is not a field of text.format"),
        ({"text": {"format": {"type": "json_schema", "json_schema": {"name": "w", "schema": {}}}}},
         '\'json_schema\' is not a field of text.format, where {"type": "json_schema", "name": …, "schema": {…}} is'),
        ({"text": {"format": "json"}}, 'in text.format an object is expected: {"type": "json_schema", "name"'),
        ({"text": {"format": {}}}, "text.format.type: Field required"),
        ({"text": {"verbosity": "low"}}, "verbosity in text is not served"),
        ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "each bring a grammar"),
        ({"response_format": {"type": "json_object"}}, "send text.format"),
    ],
)  # fmt: skip
def test_other_formats_are_refused(fields: dict[str, Any], says: str) -> None:
    assert says in refused(**fields).message
