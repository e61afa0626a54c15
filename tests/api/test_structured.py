"""Structured output, as bodies ask for it."""

import json
import time
from typing import Any

import pytest

from server.api.protocol.body import BodyLimits
from server.api.protocol.chat import ChatBody
from server.api.protocol.completions import CompletionBody
from server.api.protocol.generation import GenerationBody
from server.api.transport.bodies import validated
from server.errors import InvalidRequest
from server.grammars.limits import MAX_CHOICES, MAX_DEPTH
from server.grammars.source import GrammarSource

LIMITS = BodyLimits(max_model_len=100, vocab_size=100, max_prompts=2, max_n=2, max_stop=2, max_stop_chars=3,
                    max_messages=2, max_parts=2, max_logprobs=5, max_tools=2)  # fmt: skip
BODIES: list[tuple[Any, dict[str, Any]]] = [
    (CompletionBody, {"model": "m", "prompt": "x"}),
    (ChatBody, {"model": "m", "messages": [{"role": "user", "content": "x"}]}),
]
SCHEMA = {"type": "object", "properties": {"ä": {"type": "string"}}}
TEXT = '{"type":"object","properties":{"ä":{"type":"string"}}}'


def source(fields: dict[str, Any], kind: Any = CompletionBody) -> GrammarSource | None:
    asked = next(asked for it, asked in BODIES if it is kind)
    body: GenerationBody = validated(kind, asked | fields, LIMITS)
    return body.source


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


def named(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a_B-9"} | fields}}


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
@pytest.mark.parametrize(
    ("fields", "kind_of", "text"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type":"object"}'),
        (named(schema=SCHEMA, strict=True, description="of it"), "json_schema", TEXT),
        (named(schema=SCHEMA, strict=False), "json_schema", TEXT),
        (named(), "json_schema", '{"type":"object"}'),
        (named(schema={}), "json_schema", "{}"),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", TEXT),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", TEXT),
        ({"structured_outputs": {"json_object": True, "json": None}}, "json_schema", '{"type":"object"}'),
        ({"structured_outputs": {"regex": "a|b", "json_object": False}}, "regex", "a|b"),
        ({"structured_outputs": {"choice": ["ä", 'b"']}}, "choice", '["ä", "b\\""]'),
        ({"structured_outputs": {"grammar": "root ::= 'a'", "disable_fallback": True}}, "ebnf", "root ::= 'a'"),
        ({"guided_json": SCHEMA}, "json_schema", TEXT),
        ({"guided_json": TEXT}, "json_schema", TEXT),
        ({"guided_regex": "a", "guided_json": None}, "regex", "a"),
        ({"guided_choice": ["a"]}, "choice", '["a"]'),
        ({"guided_grammar": "start: x", "response_format": {"type": "text"}}, "ebnf", "start: x"),
    ],
)
def test_each_way_of_saying_it_comes_to_one_source(kind: Any, fields: dict[str, Any], kind_of: Any, text: str) -> None:
    param = next(name for name, value in fields.items() if value is not None)
    assert source(fields, kind) == GrammarSource(kind_of, text, param)


@pytest.mark.parametrize(
    "fields",
    [{}, {"response_format": None}, {"response_format": {"type": "text"}}, {"structured_outputs": None},
     {"guided_json": None, "guided_regex": None, "guided_choice": None, "guided_grammar": None}],
)  # fmt: skip
def test_whoever_asks_for_nothing_gets_no_grammar(fields: dict[str, Any]) -> None:
    assert source(fields) is None


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"response_format": "json_object"}, "response_format",
         'in response_format an object is expected: {"type": "json_schema", "json_schema": {"name": …, "schema"'),
        ({"response_format": {}}, "response_format", "response_format.type: Field required"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "type 'structural_tag' is not served"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs json_schema"),
        ({"response_format": {"type": "json_object", "json_schema": {"name": "a"}}}, "response_format",
         "of type 'json_object' has no json_schema"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format",
         "'schema' is not a field of response_format"),
        (named(name="a b"), "response_format", "name"),
        (named(name="a" * 65), "response_format", "name"),
        (named(name="a\n"), "response_format", "name"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format",
         "name: Field required"),
        (named(schema=[]), "response_format", "the schema in response_format must be a JSON object"),
        (named(schema=True), "response_format", "must be a JSON object"),
        (named(schema={"minimum": 1e999}), "response_format", "a number that is too large"),
        (named(schema=nested(MAX_DEPTH + 1)), "response_format", "more than 64 deep"),
        (named(strict="yes"), "response_format", "strict"),
        (named(json={}), "response_format", "'json' is not a field of response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"type": "object"}}}, "response_format",
         '\'type\' is not a field of response_format.json_schema, where {"name": …, "schema": {…}} is expected'),
        (named(schema_={}), "response_format", "'schema_' is not a field"),
        ({"structured_outputs": {}}, "structured_outputs", "has none of them; send one of json, regex"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", "has none of them"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "has regex and choice"),
        ({"structured_outputs": {"json": {}, "json_object": True}}, "structured_outputs", "has json and json_object"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs", "regex"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "is not valid JSON"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs", "must be a JSON object, not list"),
        ({"structured_outputs": {"json": '{"a":1,"a":2}'}}, "structured_outputs", "has the key 'a' twice"),
        ({"structured_outputs": {"json": 5}}, "structured_outputs", "must be a JSON object"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs", "structural_tag in"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs", "_pattern in"),
        ({"structured_outputs": {"json": {}, "disable_any_whitespace": True}}, "structured_outputs", "is not served"),
        ({"structured_outputs": {"json": {}, "disable_additional_properties": True}}, "structured_outputs", "not"),
        ({"structured_outputs": {"yaml": "a"}}, "structured_outputs", "'yaml' is not a field of structured_outputs"),
        ({"guided_choice": []}, "guided_choice", "must be a list of texts"),
        ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, "guided_choice",
         "has 1,025 texts; at most 1,024 are served"),
        ({"guided_choice": ["a", 1]}, "guided_choice", "a list of texts, and item 1 is a number"),
        ({"guided_choice": [None]}, "guided_choice", "item 0 is null"),
        ({"structured_outputs": {"choice": [True]}}, "structured_outputs", "item 0 is true or false"),
        ({"guided_choice": "a"}, "guided_choice", "texts"),
        ({"guided_json": "x"}, "guided_json", "the text in guided_json is not valid JSON"),
        ({"guided_json": []}, "guided_json", "the schema in guided_json must be a JSON object"),
        ({"guided_regex": 5}, "guided_regex", "guided_regex"),
        ({"guided_grammar": ""}, "guided_grammar", "guided_grammar"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend", "is not served"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "is not served"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex",
         "response_format and guided_regex each bring a grammar; send one"),
        ({"guided_choice": ["a"], "structured_outputs": {"regex": "a"}}, "guided_choice",
         "structured_outputs and guided_choice each"),
        ({"guided_grammar": "a", "guided_json": {}}, "guided_grammar", "guided_json and guided_grammar each"),
    ],
)  # fmt: skip
def test_what_is_not_served_or_not_clear_is_refused_by_its_field(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        source(fields)
    assert refusal.value.param == param and says in refusal.value.message, refusal.value.message
    assert len(refusal.value.message) < 300


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"guided_choice": [1]}, "invalid_grammar"),
        ({"guided_choice": []}, "invalid_grammar"),
        ({"guided_choice": ["a"] * (MAX_CHOICES + 1)}, "unsupported_grammar"),
        ({"guided_json": "{"}, "invalid_grammar"),
        ({"guided_json": 5}, "invalid_grammar"),
        (named(schema={"minimum": 1e999}), "invalid_grammar"),
        (named(schema={"x-guidance": {}}), "unsupported_grammar"),
        (named(schema=nested(MAX_DEPTH + 1)), "unsupported_grammar"),
        ({"structured_outputs": {}}, "invalid_value"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "invalid_grammar"),
        ({"tools": [{}] * 3}, "invalid_value"),
    ],
)
def test_what_is_wrong_with_a_grammar_has_its_own_code(fields: dict[str, Any], code: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        source(fields, ChatBody)
    assert refusal.value.code == code, refusal.value.message


def test_a_schema_may_be_as_deep_as_is_served() -> None:
    assert source(named(schema=nested(MAX_DEPTH))) is not None


@pytest.mark.parametrize(
    "fields",
    [{"guided_choice": [0] * 140_000}, {"structured_outputs": {str(it): 0 for it in range(50_000)}},
     {"response_format": {"type": "json_schema", "json_schema": {str(it): 0 for it in range(50_000)}}},
     {"guided_json": "[" * 2_000_000}, {"guided_json": '{"a":[' + "[]," * 600_000 + "[]]}"},
     named(schema={"required": ["a"] * 100_000})],
)  # fmt: skip
def test_what_is_too_much_holds_nobody_up(fields: dict[str, Any]) -> None:
    start = time.process_time()
    try:
        source(fields)
    except InvalidRequest as refusal:
        assert len(refusal.message) < 300
    assert time.process_time() - start < 0.5  # it is a few milliseconds
