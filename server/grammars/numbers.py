"""Numbers in JSON Schemas that the library gets wrong: those that are refused.

It computes in 64-bit floating point. And of a range like 0 < x < 0.5, whose ends have the same digits before the point,
it takes the open end nearer to zero as well, where that is a whole number.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple, TypeGuard

from server.grammars.refused import GrammarRefused

_MOST = 2**53  # up to which 64-bit floating point knows every whole number
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


class Bound(NamedTuple):
    value: float
    is_open: bool


def check(schemas: Sequence[Mapping[str, Any]]) -> None:
    """schemas: all that there are in one. Raises GrammarRefused."""
    lower, upper = list[Bound](), list[Bound]()
    for it in schemas:
        _check_size(it)
        own_lower, own_upper = (
            list(_bounds(it, "minimum", "exclusiveMinimum")),
            list(_bounds(it, "maximum", "exclusiveMaximum")),
        )
        lower += own_lower
        upper += own_upper
        if it.get("type") != "integer":
            _check_ranges(own_lower, own_upper)
    if any(map(_merges, schemas)):
        _check_ranges(lower, upper)


def _merges(schema: Mapping[str, Any]) -> bool:
    """Whether bounds of others count together with it, or with each other."""
    refers = any(name in schema for name in ("$ref", "anyOf", "oneOf"))
    return "allOf" in schema or (refers and any(name in schema for name in _BOUNDS))


def _check_size(schema: Mapping[str, Any]) -> None:
    named = [schema[name] for name in _BOUNDS if name in schema]
    for value in _numbers([*named, schema.get("const"), schema.get("enum")]):
        if abs(value) > _MOST:
            raise GrammarRefused(
                f"the schema has the number {str(value)[:40]}, and beyond {_MOST:,} not every whole number can be told "
                "from the next; use a string for it"
            )


def _numbers(value: Any) -> Iterator[int]:
    """Whole numbers in it, however deep."""
    todo = [value]
    while todo:
        it = todo.pop()
        if isinstance(it, int) and not isinstance(it, bool):
            yield it
        elif isinstance(it, list):
            todo += it
        elif isinstance(it, dict):
            todo += it.values()


def _bounds(schema: Mapping[str, Any], closed: str, exclusive: str) -> Iterator[Bound]:
    ends, opens = schema.get(closed), schema.get(exclusive)
    if _is_number(opens):
        yield Bound(float(opens), True)
    if _is_number(ends):
        yield Bound(float(ends), opens is True)  # as draft 4 has it


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_ranges(lower: Iterable[Bound], upper: Iterable[Bound]) -> None:
    for low, high in product(set(lower), set(upper)):
        if low.value < high.value and _is_mistaken(low, high):
            raise GrammarRefused(
                f"the schema has numbers above {low.value:g} and below {high.value:g}, an end left out that is a whole "
                'number next to the other, which is not served; use "type": "integer", wider bounds, or minimum and '
                "maximum that belong to it"
            )


def _is_mistaken(low: Bound, high: Bound) -> bool:
    if low.value < 0 <= high.value:
        return high == Bound(0.0, True) and low.value > -1  # -0 would be taken
    near, far = (low, high.value) if low.value >= 0 else (Bound(-high.value, high.is_open), -low.value)
    return near.is_open and near.value.is_integer() and math.trunc(far) == near.value
