"""Numbers that the library gets wrong are refused, and no others."""

from typing import Any

import pytest

from server.grammars.numbers import check
from server.grammars.refused import GrammarRefused


@pytest.mark.parametrize(
    "schema",
    [
        {"exclusiveMinimum": 0, "maximum": 0.5},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 1e-7, "type": "number"},
        {"exclusiveMinimum": 1, "maximum": 1.01, "multipleOf": 0.01},
        {"minimum": 1, "exclusiveMinimum": True, "maximum": 1.5},
        {"minimum": -1.5, "exclusiveMaximum": -1},
        {"minimum": -0.5, "exclusiveMaximum": 0.0},
        {"exclusiveMinimum": -0.5, "exclusiveMaximum": 0},
        {"const": 2**53 + 1},
        {"enum": ["a", {"b": [-(2**53) - 1]}]},
        {"type": "integer", "maximum": 2**60},
    ],
)
def test_what_would_be_wrong_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(GrammarRefused):
        check([schema])


@pytest.mark.parametrize(
    "schema",
    [
        {"exclusiveMinimum": 0},
        {"exclusiveMinimum": 0, "maximum": 1},
        {"exclusiveMinimum": 0, "exclusiveMaximum": 100},
        {"exclusiveMinimum": 0.5, "maximum": 0.75},
        {"minimum": 0, "exclusiveMaximum": 1},
        {"minimum": -0.5, "exclusiveMaximum": 0.5},
        {"minimum": -0.5, "maximum": 0},
        {"type": "integer", "exclusiveMinimum": 0, "maximum": 0.5},
        {"const": 2**53, "enum": [True, 1.5, 1e300]},
    ],
)
def test_what_is_right_is_served(schema: dict[str, Any]) -> None:
    check([schema])


def test_what_counts_together_is_looked_at_together() -> None:
    both = [{"exclusiveMinimum": 0}, {"maximum": 0.5}]
    check([{"properties": {}}, *both])
    check([{"anyOf": both}, *both])
    for beside in ({"allOf": both}, {"$ref": "#/$defs/a", "maximum": 0.5}):
        with pytest.raises(GrammarRefused):
            check([beside, *both])
