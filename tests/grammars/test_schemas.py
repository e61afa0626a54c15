"""What is served of JSON Schema, and what is refused by name."""

import json
import re
import time
from random import Random
from typing import Any

import jsonschema_rs
import pytest
from llguidance import LLTokenizer

from server.grammars import limits, patterns, schemas
from server.grammars.matchers import Refusal
from server.grammars.refused import GrammarRefused
from server.grammars.structure import check_structure
from tests.support import random_schemas
from tests.support.grammar_checks import load, matcher, takes, takes_value, walk


@pytest.fixture(scope="module")
def tokens() -> LLTokenizer:
    return load()


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"not": {}}, r"has 'not', which is not served; name what .* \(at #\)"),
        ({"properties": {"a": {"if": {}, "then": {}}}}, r"has 'if', .* \(at #/properties/a\)"),
        ({"items": {"contains": {}}}, r"has 'contains', .* \(at #/items\)"),
        ({"$defs": {"a": {"propertyNames": {}}}}, r"has 'propertyNames', .* \(at #/\$defs/a\)"),
        ({"anyOf": [{"dependentRequired": {}}]}, r"has 'dependentRequired', .* \(at #/anyOf/0\)"),
        ({"uniqueItems": True}, "has 'uniqueItems'"),
        ({"properties": {"a/b~c": {"prefixItems": [{}, {"unevaluatedProperties": False}]}}},
         "has 'unevaluatedProperties', .*#/properties/a~1b~0c/prefixItems/1"),
        ({"properties": {"a": {"type": ["null", "strng"]}}}, r"the type 'strng', and .* are \(at #/properties/a\)"),
        ({"$ref": "https://example.org/schema"}, "refers to 'https://example.org/schema'; only .* nothing is fetched"),
        ({"$ref": "file:///etc/passwd"}, "refers to 'file:"),
        ({"$ref": "other.json#/a"}, "refers to 'other.json"),
        ({"$ref": "#"}, "the reference '#' leads to itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "leads to itself"),
        ({"$ref": "#/$defs/a"}, "leads to no schema"),
        ({"$ref": "#/examples/0", "examples": [{"pattern": "(?i)a"}]}, "leads to no schema"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "drafts 4, 6, 7, 2019-09 and 2020-12 are served"),
        ({"$schema": 3}, r"\$schema is '3'"),
        ({"items": [{}]}, "list of 'items' or 'additionalItems'"),
        ({"additionalItems": False}, "list of 'items' or 'additionalItems'"),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "allOf": [{}], "additionalItems": False},
         "'additionalItems' beside allOf"),
        ({"minProperties": 2}, "'minProperties' 2 and 0 required"),
        ({"pattern": "(?i)a"}, r"has \(\?i, which"),
        ({"pattern": "[]"}, "an empty class"),
        ({"patternProperties": {"\\Zx": {}}}, "pattern"),
        ({"properties": {f"p{index}": {} for index in range(2001)}}, "more than 2,000 properties"),
        ({"anyOf": [{"enum": list(range(6000))}, {"enum": list(range(6000))}]}, "more than 10,000 values"),
    ],
)  # fmt: skip
def test_refused_by_name(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(GrammarRefused, match=said):
        schemas.served(schema)


@pytest.mark.parametrize("schema", [
    {"const": {"not": 1, "$ref": "x", "format": 3, "pattern": "[]"}}, {"enum": [{"uniqueItems": True}]},
    {"properties": {"not": {}, "if": {}, "$ref": {}, "pattern": {}, "x-guidance": {}}, "default": {"not": 1}},
    {"uniqueItems": False}, {"nullable": True, "title": "t", "$comment": "c", "my-own": {"not": {}}},
    {"minProperties": 3, "required": ["a", "b"]}, {"$ref": "#/$defs/a", "$defs": {"a": True}},
    {"properties": {"next": {"$ref": "#"}}},
])  # fmt: skip
def test_what_only_looks_like_a_keyword(schema: dict[str, Any]) -> None:
    schemas.served(schema)


def test_formats_that_are_annotations_are_left_out_where_they_are_keywords(tokens: LLTokenizer) -> None:
    schema = {
        "type": "object",
        "properties": {"format": {"type": "string", "format": "my-own"}},
        "required": ["format"],
    }
    assert schemas.served(schema)["properties"]["format"] == {"type": "string"}
    assert takes_value(tokens, matcher(tokens, "json_schema", schema), {"format": "anything"})
    dated = matcher(tokens, "json_schema", {"type": "string", "format": "date"})
    assert takes(tokens, dated, '"2026-11-22"') and not takes(tokens, dated, '"22.11.2026"')


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (r"^\s$", [" ", "\ufeff", "\u2028"], ["a", "\x85"]),
        (r"^\S$", ["a", "\x85"], [" ", "\ufeff"]),
        (r"^[\sx]$", ["x", "\ufeff"], ["y"]),
        (r"^.$", ["a", "é", "😀"], ["\n", "\r", "\u2028"]),
        (r"^[a&&b]+$", ["a&b"], ["c"]),
        (r"^[[a]$", ["[", "a"], ["]"]),
        (r"^[.]$", ["."], ["a"]),
        (r"b", ["b", "abc", "\nb\n"], ["a", ""]),
        (r"^\d\w$", ["0_"], ["٣a", "0é"]),
        (r"^a\/b\-c$", ["a/b-c"], ["a/b"]),
    ],
)  # fmt: skip
def test_patterns_mean_what_javascript_means(
    tokens: LLTokenizer, pattern: str, right: list[str], wrong: list[str]
) -> None:
    made = matcher(tokens, "json_schema", {"type": "string", "pattern": pattern})
    assert [it for it in right if not takes_value(tokens, made, it)] == []
    assert [it for it in wrong if takes_value(tokens, made, it)] == []


def test_patterns_are_rewritten_in_linear_time() -> None:
    for pattern in ("[" * 200_000, "\\" * 200_000, "." * 200_000, "[^" * 100_000, "(?" * 100_000, "[a]" * 60_000):
        start = time.perf_counter()
        try:
            patterns.in_rust(pattern)
        except GrammarRefused as refusal:
            assert len(refusal.message) < 300
        assert time.perf_counter() - start < 2


def test_structure_is_counted_before_anything_is_built() -> None:
    deepest = '{"a":' * limits.MAX_DEPTH + "1" + "}" * limits.MAX_DEPTH
    check_structure(deepest, "the schema")
    for text, said in (
        (f"[{deepest}]", "more than 64 lists and objects inside one another"),
        ("[" * 200_000, "has 200,000 lists and objects; at most 10,000"),
        ("[0" + ",0" * 100_000 + "]", "has 100,000 commas outside of its strings; at most 50,000"),
    ):
        start = time.perf_counter()
        with pytest.raises(GrammarRefused, match=re.escape(said)):
            check_structure(text, "the schema")
        assert time.perf_counter() - start < 0.5
    check_structure(json.dumps("[{," * 50_000), "the schema")
    check_structure('"\\"[[[[' + "[" * 100, "the schema")  # a string without an end


def test_numbers_that_have_no_json(tokens: LLTokenizer) -> None:
    for text in ('{"maximum": 1e999}', '{"const": ' + "1" * 6000 + "}"):
        with pytest.raises((GrammarRefused, Refusal)):
            matcher(tokens, "json_schema", text)


def test_random_schemas_are_followed(tokens: LLTokenizer) -> None:
    """What is accepted is valid, for values that nearly fit and for random walks; and much of it is accepted."""
    rng, num_served, num_right, num_walked = Random(5), 0, 0, 0
    for schema in random_schemas.schemas(200, seed=5):
        try:
            made = matcher(tokens, "json_schema", schema)
        except (GrammarRefused, Refusal):
            continue
        num_served += 1
        validator = jsonschema_rs.Draft202012Validator(schema)
        for value in random_schemas.values_for(schema, rng, 8):
            if takes_value(tokens, made, value):
                assert validator.is_valid(value), (schema, value)
                num_right += 1
        text = walk(tokens, made, rng)
        # a number without bounds may have any exponent, of which Python makes infinity
        if text is not None and not re.search(r"[eE][+-]?[0-9]{3}", text):
            assert validator.is_valid(json.loads(text)), (schema, text)
            num_walked += 1
    assert num_served > 120 and num_right > 400 and num_walked > 100
