"""Answers split into content, reasoning and calls: the same however their text comes in pieces."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.texts import template_budget
from server.api.texts.calls.listed import CALL_FORMATS
from server.api.texts.chat_template import Conversation
from server.api.texts.reasoning import REASONING_FORMATS
from server.api.texts.speech import Said, Tool
from server.api.texts.splitting import PlainSplitter, TextSplitter
from server.api.texts.text import Text
from tests.support.splits import Whole, split
from tests.support.tool_templates import KNOWN, text_with

TOOLS = {
    "look_up": Tool("look_up", None, {"type": "object", "properties": {"place": {"type": "string"},
                                      "count": {"type": "integer"}, "near": {"type": ["boolean", "null"]},
                                      "more": {"type": "object"}, "any": {"anyOf": [{"type": "string"},
                                                                                     {"type": "number"}]}}}),
    "now": Tool("now", None, {}),
}  # fmt: skip
PARTS = [
    "<tool_call>", "</tool_call>", "\n", " ", "{", "}", '{"name": "look_up", "arguments": ', '{"place": "a', '"}', "}",
    '"arguments": {"x": [1, {"y": "}"}]}', '"name": "now"', "[", "]", ", ", ";", '\\"', "\\", '"', "é", "<think>",
    "</think>", "<tool", "_call>", "<function=look_up>", "<parameter=count>", "7", "</parameter>",
    "</function>", "look_up(", "place=", "'it\\'s'", ")",
    "[TOOL_CALLS]", "[ARGS]", "now", "<arg_key>", "</arg_key>", "<arg_value>",
    "</arg_value>", "<|channel|>", "analysis", "final", "<|message|>", "<|end|>", "<|start|>assistant",
    " to=functions.",
    "<|call|>", "<|python_tag|>", "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "functions.now:0",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|tool_calls_section_end|>", "<|tool_call_start|>", "text",
    "<\uff5ctool\u2581calls\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581begin\uff5c>", "function",
    "<\uff5ctool\u2581sep\uff5c>", "\n```json\n", "\n```", "<\uff5ctool\u2581call\u2581end\uff5c>", "<|tool_call|>",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=3)), max_size=25).map("".join)


def cut(text: str, data: st.DataObject) -> list[str]:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)]


def splitter_of(calls: str | None, reasoning: str | None = None, is_open: bool = False) -> TextSplitter:
    return TextSplitter(
        REASONING_FORMATS[reasoning] if reasoning else None, CALL_FORMATS[calls] if calls else None, TOOLS, is_open
    )


@pytest.mark.parametrize("name", CALL_FORMATS)
@given(texts, st.sampled_from([None, "think", "harmony"]), st.booleans(), st.data())
@settings(max_examples=150)
def test_pieces_change_nothing(name: str, text: str, reasoning: str | None, is_open: bool, data: st.DataObject) -> None:
    is_open = is_open and reasoning is not None
    whole = split(splitter_of(name, reasoning, is_open), [text])
    assert split(splitter_of(name, reasoning, is_open), cut(text, data)) == whole
    assert split(splitter_of(name, reasoning, is_open), list(text)) == whole


@pytest.mark.parametrize("name", [it for it in CALL_FORMATS if it != "harmony"])
@given(texts)
@settings(max_examples=150)
def test_what_is_no_call_is_content_and_unchanged(name: str, text: str) -> None:
    whole = split(splitter_of(name), [text])
    if not whole.calls:
        assert whole.content == text


@given(st.data())
@settings(max_examples=20)
def test_texts_on_both_sides_of_a_call_are_lines_of_their_own(data: st.DataObject) -> None:
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    text = f"Sure! {call}\n{call}\n\n Anything else?\n"
    whole = split(splitter_of("hermes"), cut(text, data))
    assert whole.content == "Sure!\nAnything else?\n" and len(whole.calls) == 2
    assert split(splitter_of("hermes"), cut(f"{call}\nSure!", data)).content == "Sure!"


# -- what templates write ---

keys = st.text("abcxyz_", min_size=1, max_size=5)
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<>[]|\uff5c"), max_size=8)
values = st.recursive(
    words | st.integers(-(10**6), 10**6) | st.booleans() | st.none(),
    lambda its: st.lists(its, max_size=3) | st.dictionaries(keys, its, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(keys, values, max_size=4)
KINDS = {str: "string", int: "integer", bool: "boolean", list: "array", dict: "object", type(None): "null"}
_loaded: dict[str, Text] = {}


@pytest.fixture(scope="module", autouse=True)
def with_time() -> Iterator[None]:
    """Thousands of renderings: a collection of all that other tests have left may fall into one, and takes as long as
    a template may (tests/api/test_template_sandbox.py holds to that)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_budget, "MAX_SECONDS", 60.0)
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Text]:
    if not _loaded:
        for name, (template, _) in KNOWN.items():
            _loaded[name] = text_with(template, tmp_path_factory.mktemp(name))
    return _loaded


def tool_for(name: str, arguments: dict[str, Any]) -> Tool:
    return Tool(name, None, {"type": "object", "properties": {
        key: {"type": KINDS[type(it)]} for key, it in arguments.items()}})  # fmt: skip


def written(text: Text, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """What the template makes of a turn with calls, behind where it begins."""
    user = {"role": "user", "content": "hi"}
    turn = {"role": "assistant", "content": "", "tool_calls": [
        {"id": f"abcdefgh{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for index, (name, arguments) in enumerate(calls)]}  # fmt: skip
    asked, whole = text.render_chat(Conversation([user])), text.render_chat(Conversation([user, turn], {}, False))
    begin = (
        whole.index("hi") + len(asked) - asked.index("hi") - (len("<think>\n") if asked.endswith("<think>\n") else 0)
    )
    return whole[begin:]


@pytest.mark.parametrize("name", KNOWN)
@given(st.lists(st.tuples(st.sampled_from(["look_up", "get-it", "a_1"]), objects), min_size=1, max_size=3), st.data())
@settings(max_examples=60)
def test_calls_are_read_as_templates_write_them(
    loaded: dict[str, Text], name: str, calls: list[tuple[str, dict[str, Any]]], data: st.DataObject
) -> None:
    text, format = loaded[name], KNOWN[name][1]
    use = text.tool_use
    assert use is not None and use.format is not None and use.format.name == format
    calls = list(dict(calls).items())[: None if use.takes_several else 1]
    if format in ("minimax_m2", "glm4", "seed", "qwen3_xml"):  # values without quotes have no edges
        calls = [(it, {key: its for key, its in arguments.items() if its == "" or not isinstance(its, str)
                       or its == its.strip()}) for it, arguments in calls]  # fmt: skip
    tools = {it: tool_for(it, arguments) for it, arguments in calls}
    said = split(TextSplitter(None, use.format, tools), cut(written(text, calls), data))
    assert [(it, json.loads(arguments)) for it, arguments in said.calls] == calls


# -- single cases ---

CALL = '<tool_call>\n{"name": "now", "arguments": {"a": "<tool_call>}"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CALL, Whole("", "", [("now", '{"a": "<tool_call>}"}')])),
        (f"Let me see.\n{CALL}\n", Whole("Let me see.", "", [("now", '{"a": "<tool_call>}"}')])),
        (f"\n {CALL}\n{CALL}\n done ", Whole("done ", "", [("now", '{"a": "<tool_call>}"}')] * 2)),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', Whole("", "", [("f", '{"a": 1}')])),
        (
            '<tool_call>{"name": "f", "arguments": {"a":\n"b\nc"}}</tool_call>',
            Whole("", "", [("f", '{"a":\n"b\\u000ac"}')]),
        ),
        ('<tool_call>{"name": "f"}</tool_call>', Whole("", "", [("f", "{}")])),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', Whole("", "", [("f", "{}")])),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', Whole("", "", [("f", '{"a": 1}')])),
        ('<tool_call>{"name": "f", "arguments": {"a": [', Whole("", "", [("f", '{"a": [')])),
        ('<tool_call>{"name": "f", "argum', Whole('<tool_call>{"name": "f", "argum', "", [])),
        ('<tool_call>{"arguments": {}}</tool_call>', Whole('<tool_call>{"arguments": {}}</tool_call>', "", [])),
        ("<tool_call>not JSON</tool_call>", Whole("<tool_call>not JSON</tool_call>", "", [])),
        ('<tool_call>{"name": 7, "arguments": {}}', Whole('<tool_call>{"name": 7, "arguments": {}}', "", [])),
        ('<tool_call>{"name": "f", "arguments": {}}} x', Whole("} x", "", [("f", "{}")])),
        ("a <tool_", Whole("a <tool_", "", [])),
        ("  \n", Whole("  \n", "", [])),
        (f"{CALL[:-4]}", Whole("", "", [("now", '{"a": "<tool_call>}"}')])),
    ],
)
def test_calls_between_markers(text: str, expected: Whole) -> None:
    assert split(splitter_of("hermes"), list(text)) == expected


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("llama3_json", '{"name": "now", "parameters": {}}; {"name": "look_up", "parameters": {"place": "x"}}',
         Whole("", "", [("now", "{}"), ("look_up", '{"place": "x"}')])),
        ("llama3_json", '<|python_tag|>{"type": "function", "name": "other", "parameters": {}}',
         Whole("", "", [("other", "{}")])),
        ("llama3_json", '{"name": "Ada", "parameters": {}}', Whole('{"name": "Ada", "parameters": {}}', "", [])),
        ("llama3_json", 'So: {"name": "now", "parameters": {}}',
         Whole('So: {"name": "now", "parameters": {}}', "", [])),
        ("pythonic", "[look_up(place='it\\'s', count=-3, near=None, more={'a': [True, 1.5]}), now()]",
         Whole("", "", [("look_up", '{"place": "it\'s", "count": -3, "near": null, "more": {"a": [true, 1.5]}}'),
                        ("now", "{}")])),
        ("pythonic", "[1, 2]", Whole("[1, 2]", "", [])),
        ("pythonic", "[now(1)]", Whole("[now(1)]", "", [])),
        ("pythonic", "[look_up(place=__import__('os'))]",
         Whole("", "", [("look_up", '{"place": "__import__(\'os\')"}')])),
        ("qwen3_xml", "<tool_call>\n<function=look_up>\n<parameter=place>\nNew\n\"York\"\n\n</parameter>\n"
         "<parameter=count>\n3\n</parameter>\n<parameter=near>null</parameter>\n<parameter=any>12</parameter>\n"
         "<parameter=other>12</parameter>\n</function>\n</tool_call>",
         Whole("", "", [("look_up", '{"place": "New\\n\\"York\\"\\n", "count": 3, "near": null, "any": 12, '
                         '"other": "12"}')])),
        ("qwen3_xml", "<tool_call>\n<function=look_up>\n<parameter=count>\nmany\n</parameter></function></tool_call>",
         Whole("", "", [("look_up", '{"count": "many"}')])),
        ("qwen3_xml", "<tool_call>\n<function=look_up>\n<parameter=count>\n1\n</parameter>\n</fun",
         Whole("", "", [("look_up", '{"count": 1')])),
        ("seed", "<seed:tool_call><function=look_up><parameter=place>here</par",
         Whole("", "", [("look_up", '{"place": "here</par')])),
        ("glm4", "<tool_call>now\n</tool_call>", Whole("", "", [("now", "{}")])),
        ("glm4", "<tool_call>now is <b>", Whole("<tool_call>now is <b>", "", [])),
        ("mistral_args", "[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}[TOOL_CALLS]look_up[ARGS]{\"place\": \"x\"}",
         Whole("", "", [("now", "{}"), ("look_up", '{"place": "x"}')])),
        ("kimi_k2", "Yes.<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}"
         "<|tool_call_end|><|tool_calls_section_end|>", Whole("Yes.", "", [("now", "{}")])),
        ("deepseek_v31", "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>now"
         "<\uff5ctool\u2581sep\uff5c>{\"a\": 1", Whole("", "", [("now", '{"a": 1')])),
        ("harmony", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.now "
         "<|constrain|>json<|message|>{\"a\": 1}<|call|>", Whole("", "Hm.", [("now", '{"a": 1}')])),
        ("harmony", "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi."
         "<|return|>",
         Whole("Hi.", "Hm.", [])),
        ("harmony", "no header", Whole("no header", "", [])),
    ],
)  # fmt: skip
def test_calls_of_other_formats(name: str, text: str, expected: Whole) -> None:
    assert split(splitter_of(name), list(text)) == expected


@pytest.mark.parametrize(
    ("is_open", "text", "expected"),
    [
        (False, "<think>\n\nWell,\n\nno.\n</think>\n\nHi\n", Whole("Hi\n", "Well,\n\nno.", [])),
        (False, "\n<think>\n\n</think>\n\nHi", Whole("Hi", "", [])),
        (False, " \nHi <think>x</think>", Whole(" \nHi <think>x</think>", "", [])),
        (False, "<think>cut o", Whole("", "cut o", [])),
        (False, "<thin", Whole("<thin", "", [])),
        (True, "\nWell.\n</think>Hi", Whole("Hi", "Well.", [])),
        (True, "Well.", Whole("", "Well.", [])),
    ],
)
def test_reasoning(is_open: bool, text: str, expected: Whole) -> None:
    assert split(splitter_of(None, "think", is_open), list(text)) == expected
    assert split(splitter_of("hermes", "think", is_open), [text]) == expected


def test_it_is_known_whether_the_model_reasons() -> None:
    splitter = splitter_of(None, "think")
    states = []
    for piece in ("<think>", "a", "</think>", "b"):
        states.append(splitter.is_reasoning)
        splitter.push(piece)
    assert states == [False, True, True, False]
    assert splitter_of(None, "think", is_open=True).is_reasoning


def test_reasoning_and_calls_together() -> None:
    said = split(splitter_of("hermes", "think"), list(f"<think>I call.</think>\n\nSo.\n{CALL}"))
    assert said == Whole("So.", "I call.", [("now", '{"a": "<tool_call>}"}')])


def test_a_call_is_told_as_it_comes() -> None:
    splitter = splitter_of("hermes")
    assert not splitter.push('<tool_call>\n{"name": "now", ')
    [piece] = splitter.push('"arguments": {"a": "b').calls
    assert (piece.index, piece.name, piece.arguments) == (0, "now", '{"a": "b')
    assert splitter.push("c").calls[0].arguments == "c"
    assert splitter.push('"}').calls[0].arguments == '"}'
    assert not splitter.push("}\n</tool_call>") and not splitter.flush()


def test_a_plain_answer_is_content() -> None:
    splitter = PlainSplitter()
    assert splitter.push("<think>") == Said("<think>") and not splitter.flush() and splitter.num_calls == 0


@pytest.mark.parametrize("name", CALL_FORMATS)
@pytest.mark.parametrize(("size", "times"), [(4, 1), (1 << 20, 40)])
def test_long_answers_take_time_by_their_length_alone(name: str, size: int, times: int) -> None:
    long = '<tool_call>\n{"name": "now", "arguments": {"a": "' + '\\"{[ \n' * 500 * times
    texts = {
        "long": long,
        "held": long.replace('"name": "now", ', ""),
        "opened": "<tool_call>" * 300 * times,
        "white": " \n" * 1500 * times,
        "brackets": "[{" * 1500 * times,
        "marks": "<" * 3000 * times,
        "tag": "<tool_call>\n<function=look_up>\n<parameter=place>" + "</param" * 500 * times,
        "python": "[look_up(place=" + "[" * 1500 * times + '"' + "a" * 1500 * times,
        "channel": "<|channel|>commentary to=functions.now<|message|>{" + '"<|' * 1000 * times,
    }
    start = time.process_time()
    for text in texts.values():
        split(splitter_of(name, "think"), [text[at : at + size] for at in range(0, len(text), size)])
    assert time.process_time() - start < 10  # a tenth of a second; by the square of the length, minutes


def test_deep_values_of_python_are_strings(tmp_path: Path) -> None:
    deep = "[" * 5000 + "]" * 5000
    said = split(splitter_of("pythonic"), [f"[look_up(place={deep})]"])
    assert json.loads(said.calls[0][1]) == {"place": deep}
