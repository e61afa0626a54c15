"""Blocks of /v1/messages, its tools, its format and its thinking: what is read of them, and what is refused by name."""

from typing import Any

import pytest

from server.api.generating.messages import conversation, wanted
from server.api.protocol.body import BodyLimits
from server.api.protocol.messages import MessageBody, PromptBody
from server.api.texts.speech import Tool, ToolsWanted
from server.api.transport.bodies import validated
from server.errors import InvalidRequest
from tests.support.scripted import MEANT

LIMITS = BodyLimits(max_model_len=100, vocab_size=100, max_prompts=2, max_n=2, max_stop=2, max_stop_chars=3,
                    max_messages=20, max_parts=10, max_logprobs=5, max_tools=3)  # fmt: skip
USER = {"role": "user", "content": "x"}
PLACE = {"type": "object", "properties": {"city": {"type": "string"}}}
FORMAT = {"type": "json_schema", "schema": PLACE}


def text(it: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": it} | fields


def use(id: str = "a", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": f"f_{id}", "input": {}} | fields


def result(id: str = "a", content: Any = "done", **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id, "content": content} | fields


def thinking(it: str = "Hm.", **fields: Any) -> dict[str, Any]:
    return {"type": "thinking", "thinking": it, "signature": "unsigned"} | fields


def assistant(*content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": [*content]}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*content]}


def tool(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"name": name, "input_schema": PLACE} | fields


def read(*messages: Any, **fields: Any) -> MessageBody:
    return validated(
        MessageBody, {"model": "m", "max_tokens": 9, "messages": list(messages) or [USER]} | fields, LIMITS
    )


def refused(*messages: Any, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refusal:
        read(*messages, **fields)
    assert len(refusal.value.message) < 400
    return refusal.value


# -- blocks ---


def test_blocks_are_turns_and_results_as_templates_read_them() -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    body = read(
        USER, assistant(thinking(), text("Let "), text("me."), use("a", input={"x": [1]}, caller={"type": "direct"}),
                        use("b", **cached)),
        user(result("b", [text("it "), text("is", **cached)], is_error=False),
             result("a", "no", is_error=True, **cached), text("Now?")),
        assistant(use("c")), user(result("c", None)),
    )  # fmt: skip
    assert body.said == [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "Let me.", "reasoning_content": "Hm.", "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f_a", "arguments": {"x": [1]}}},
            {"id": "b", "type": "function", "function": {"name": "f_b", "arguments": {}}}]},
        {"role": "tool", "content": "it is", "tool_call_id": "b", "name": "f_b"},
        {"role": "tool", "content": "Error: no", "tool_call_id": "a", "name": "f_a"},
        {"role": "user", "content": "Now?"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "f_c", "arguments": {}}}]},
        {"role": "tool", "content": "", "tool_call_id": "c", "name": "f_c"},
    ]  # fmt: skip
    assert conversation(body).may_lose_reasoning


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([user(result("nope"))], "the call 'nope' is answered"),
        ([assistant(use()), USER, assistant(text("a")), user(result())], "'a' is answered"),
        ([assistant(use(), use()), USER], "two calls in one turn have the id 'a'"),
        ([USER, assistant(use())], "the last turn calls tools; send what came of it"),
        ([assistant(use()), user(text("a"), result())], "tool_result blocks come before a turn's text"),
        ([user(use())], "content of type 'tool_use' in messages of the role user is not served"),
        ([user(thinking())], "content of type 'thinking' in messages of the role user is not served"),
        ([assistant(result())], "content of type 'tool_result' in messages of the role assistant is not served"),
        ([assistant({"type": "redacted_thinking", "data": "x"})], "nobody here can read it, so leave it out"),
        ([assistant({"type": "server_tool_use"})], "content of type 'server_tool_use' in messages of the role"),
        ([assistant(use()), user(result(content=[{"type": "image"}]))],
         "content of type 'image' in messages, in a tool_result, is not served: models"),
        ([assistant(use()), user(result(content=5))], "must be a text, or a list of text blocks; of anything else"),
        ([assistant(use(input=[]))], "arguments of a call"),
        ([assistant(use(id=""))], "id: String should have at least 1"),
        ([assistant(use(caller={"type": "code_execution"}))], "caller in content is not served"),
        ([assistant(thinking(data=1))], "'data' is not a field of content"),
        ([user(*[text("x")] * 11)], "11 parts"),
    ],
)  # fmt: skip
def test_other_blocks_are_refused(messages: list[Any], says: str) -> None:
    refusal = refused(*messages)
    assert says in refusal.message, refusal.message


def test_a_call_that_is_too_deep_is_refused() -> None:
    deep: Any = 1
    for _ in range(70):
        deep = {"a": deep}
    assert "more than 64 deep" in refused(assistant(use(input=deep)), USER).message


# -- tools ---


def test_tools_are_read_as_they_are_meant() -> None:
    body = read(tools=[
        tool("a", description="b", strict=True, type="custom", cache_control={"type": "ephemeral"}),
        tool("c" * 128, eager_input_streaming=True, input_examples=[]),
    ])  # fmt: skip
    assert body.tools_wanted == ToolsWanted([Tool("a", "b", PLACE, True), Tool("c" * 128, None, PLACE)])
    assert conversation(body).tools == body.tools_wanted.tools and wanted(body, MEANT).tools == body.tools_wanted


@pytest.mark.parametrize(
    ("choice", "must", "only", "parallel"),
    [
        (None, False, None, True),
        ({"type": "auto"}, False, None, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, False, None, False),
        ({"type": "any", "disable_parallel_tool_use": False}, True, None, True),
        ({"type": "tool", "name": "b"}, True, {"b"}, False),
    ],
)
def test_a_choice_says_who_must_call_what(choice: Any, must: bool, only: Any, parallel: bool) -> None:
    made = read(tools=[tool("a"), tool("b")], tool_choice=choice).tools_wanted
    assert made is not None and (made.must_call, made.only, made.parallel) == (must, only, parallel)


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": [tool()], "tool_choice": {"type": "none"}}])
def test_where_nothing_can_be_called_nobody_is_told_of_tools(fields: dict[str, Any]) -> None:
    body = read(**fields)
    assert body.tools_wanted is None and conversation(body).tools == ()


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools",
         "of type 'web_search_20250305' is not served; custom is"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools",
         'of type \'function\' is not served; a function is {"name": …, "description": …, "input_schema": {…}} here'),
        ({"tools": [{"name": "f", "parameters": {}}]}, "tools", 'where {"name": …, "description": …, "input_schema"'),
        ({"tools": [{"name": "f"}]}, "tools", "tools.0.input_schema: Field required"),
        ({"tools": [tool(input_schema=[])]}, "tools", "must be a JSON object"),
        ({"tools": [tool("a b")]}, "tools", "name"),
        ({"tools": [tool(input_examples=[{}])]}, "tools", "input_examples in tools is not served"),
        ({"tools": [tool(), tool()]}, "tools", "two tools have the name 'f'"),
        ({"tools": [tool(f"f{it}") for it in range(4)]}, "tools", "4 tools; at most 3 are served"),
        ({"tool_choice": {"type": "any"}}, "tool_choice", "no tools to call"),
        ({"tools": [tool()], "tool_choice": {"type": "tool"}}, "tool_choice", "needs a name"),
        ({"tools": [tool()], "tool_choice": {"type": "any", "name": "f"}}, "tool_choice", "has no name"),
        ({"tools": [tool()], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice", "names 'g'"),
        ({"tools": [tool()], "tool_choice": {"type": "none", "disable_parallel_tool_use": True}}, "tool_choice",
         "lets tools be called"),
        ({"tools": [tool()], "tool_choice": "auto"}, "tool_choice",
         'in tool_choice an object is expected: {"type": "auto"}, "any" or "none", or {"type": "tool", "name": …}'),
        ({"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice",
         'a function is {"type": "tool", "name": …} here'),
    ],
)  # fmt: skip
def test_other_tools_are_refused(fields: dict[str, Any], param: str, says: str) -> None:
    refusal = refused(**fields)
    assert refusal.param == param and says in refusal.message, refusal.message


# -- formats and thinking ---


@pytest.mark.parametrize("fields", [{"output_config": {"format": FORMAT}}, {"output_format": FORMAT}])
def test_a_format_is_what_the_text_must_spell(fields: dict[str, Any]) -> None:
    source = wanted(read(**fields), MEANT).source
    assert source is not None and source.kind == "json_schema" and '"city"' in source.text


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, None),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "adaptive"}}, True),
        ({"thinking": {"type": "enabled", "budget_tokens": 8}}, True),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, True),
    ],
)
def test_thinking_is_on_or_off_or_as_the_template_has_it(fields: dict[str, Any], thinks: bool | None) -> None:
    assert conversation(read(**fields)).thinks is thinks


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"output_format": FORMAT, "output_config": {"format": FORMAT}}, "output_format", "send the latter"),
        ({"output_config": {"format": {"type": "regex"}}}, "output_config", "of type 'regex' is not served"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config", "schema: Field required"),
        ({"output_config": {"effort": "max"}}, "output_config", "effort"),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking", "budget_tokens is 5 of 9 max_tokens"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 5}}, "thinking", "has no budget_tokens"),
        ({"thinking": {"type": "adaptive", "display": "omitted"}}, "thinking", "comes as the model wrote it"),
        ({"response_format": {"type": "json_object"}}, "response_format", "send output_config.format"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "send output_config.effort"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "send tool_choice.disable_parallel_tool_use"),
        ({"output_config": {"format": {"type": "json_schema", "json_schema": {}}}}, "output_config",
         "'json_schema' is not a field of output_config.format, where"),
        ({"thinking": {"type": "between_tools"}}, "thinking", "thinking.type"),
    ],
)  # fmt: skip
def test_other_forms_are_refused(fields: dict[str, Any], param: str, says: str) -> None:
    refusal = refused(**fields)
    assert refusal.param == param and says in refusal.message, refusal.message


def test_a_prompt_is_counted_whatever_is_thought_of_it() -> None:
    body = {"model": "m", "messages": [USER], "thinking": {"type": "enabled", "budget_tokens": 1}, "tools": [tool()]}
    counted = validated(PromptBody, body, LIMITS)
    assert conversation(counted).thinks and len(conversation(counted).tools) == 1
