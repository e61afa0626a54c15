"""Masks against brute force: a token is allowed where the library takes it, and only there."""

import json
from random import Random

import pytest
from llguidance import LLTokenizer

from server.grammars.source import Kind
from tests.support.grammar_checks import STOP, VOCAB, allowed, load, matcher, walk

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "é"]}, "maxItems": 3},
        "more": {"anyOf": [{"type": "null"}, {"type": "object", "additionalProperties": {"type": "number"}}]},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokens() -> LLTokenizer:
    return load()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("json_schema", PERSON),
        ("regex", r"(\+[0-9]{1,3} )?[0-9]{3}-[0-9]{4}|no|nö"),
        ("choice", ["yes", "yes, please", "no", "<|end|>"]),
        ("ebnf", 'root ::= term ([-+*/] term)*\nterm ::= [0-9]+ | "(" root ")"'),
    ],
)
def test_a_mask_is_what_may_come_next(tokens: LLTokenizer, kind: Kind, said: object) -> None:
    for seed in range(2):
        rng, made = Random(seed), matcher(tokens, kind, said)
        for _ in range(40):
            by_mask = allowed(made.compute_bitmask())
            if made.is_stopped():
                assert by_mask == [STOP]
                break
            assert by_mask == [it for it in range(VOCAB) if made.validate_tokens([it]) == 1]
            assert (STOP in by_mask) == made.is_accepting()
            assert not any(tokens.is_special_token(it) for it in by_mask if it != STOP)
            choices = [it for it in by_mask if it != STOP]
            if not choices:
                break
            assert made.consume_token(rng.choice(choices))


def test_random_answers_are_json(tokens: LLTokenizer) -> None:
    made, rng, num = matcher(tokens, "json_schema", PERSON), Random(0), 0
    for _ in range(30):
        text = walk(tokens, made, rng)
        if text is not None:
            person, num = json.loads(text), num + 1
            assert 1 <= len(person["name"]) <= 12 and 0 <= person["age"] <= 120
            assert set(person.get("tags", ())) <= {"a", "bc", "é"}
    assert num > 10
