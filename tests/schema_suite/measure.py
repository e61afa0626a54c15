"""What becomes of each case."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from server.grammars import schemas
from server.grammars.matchers import Refusal
from server.grammars.refused import GrammarRefused
from tests.schema_suite.cases import Case, Instance
from tests.support.grammar_checks import load, matcher, takes_value

_MOST_ORDERS = 300
_NUMBERS = "a number of `const`, `enum` or `integer` spelled otherwise (`1.0` for `1`)"
_ORDER = "properties in another order than the schema's"
_NARROW = "a format that is an annotation is enforced, in its common forms"
_SHAPE = "a date or time of the right form that no calendar has"
_ANNOTATED = "`contentEncoding` and `contentMediaType` are annotations"
_BESIDE = "keywords beside `$ref`, which drafts before 2019-09 pass over, are followed"
_OVERFLOW = "an integer spelled with an exponent"


@dataclass
class Column:
    """A draft. Reasons are counted, and `unexplained` are those that nobody has looked at."""

    schemas: int = 0
    served: int = 0
    right: int = 0
    annotated: int = 0  # instances of formats that are not enforced
    refused: Counter[str] = field(default_factory=Counter)
    too_narrow: Counter[str] = field(default_factory=Counter)
    too_wide: Counter[str] = field(default_factory=Counter)
    unexplained: list[str] = field(default_factory=list)


def measure(cases: Iterable[Case]) -> dict[str, Column]:
    """By draft."""
    tokens, columns = load(), dict[str, Column]()
    for case in cases:
        column = columns.setdefault(case.draft, Column())
        column.schemas += 1
        try:
            made = matcher(tokens, "json_schema", json.dumps(case.schema))
        except (GrammarRefused, Refusal) as refusal:
            column.refused[_feature(str(refusal))] += 1
            continue
        column.served += 1
        for instance in case.instances:
            _judge(column, case, instance, tokens, made)
    return columns


def _judge(column: Column, case: Case, instance: Instance, tokens: LLTokenizer, made: LLMatcher) -> None:
    form = case.schema.get("format") if isinstance(case.schema, dict) else None
    if isinstance(form, str) and form not in schemas.ENFORCED_FORMATS:
        column.annotated += 1
        return
    is_taken = takes_value(tokens, made, instance.value)
    if is_taken == instance.is_valid:
        column.right += 1
        return
    reason = _reason(case, instance, tokens, made)
    if reason is None:
        said = "is taken" if is_taken else "is not taken"
        column.unexplained.append(f"{case.draft} {case.name}: {case.about}: {instance.about}: {said}")
        reason = "nobody has looked at it"
    (column.too_wide if is_taken else column.too_narrow)[reason] += 1


def _reason(case: Case, instance: Instance, tokens: LLTokenizer, made: LLMatcher) -> str | None:
    name = case.name.rpartition("/")[2]
    if not instance.is_valid:
        if name in ("date", "time", "date-time"):
            return _SHAPE
        return _ANNOTATED if name == "content" else None
    if case.name == "format" or name in ("email", "ipv6"):
        return _NARROW
    if any(takes_value(tokens, made, it) for it in itertools.islice(_orders(instance.value), _MOST_ORDERS)):
        return _ORDER
    if name == "float-overflow":
        return _OVERFLOW
    if name == "ref" and case.draft == "draft7" and "sibling" in case.about:
        return _BESIDE
    has_float = re.search(r"[0-9]\.0", json.dumps(instance.value)) is not None
    return _NUMBERS if has_float and name in ("const", "enum", "type") else None


def _orders(value: Any) -> Iterator[Any]:
    """The same value, with its properties in other orders."""
    if isinstance(value, dict):
        for items in itertools.permutations(value.items()):
            for below in itertools.product(*(list(itertools.islice(_orders(it), 6)) for _, it in items)):
                yield dict(zip((name for name, _ in items), below, strict=True))
    elif isinstance(value, list):
        yield from map(list, itertools.product(*(list(itertools.islice(_orders(it), 6)) for it in value)))
    else:
        yield value


def _feature(message: str) -> str:
    """What a refusal is about, without what is of its schema alone."""
    known = re.match(r"the schema has '([$\w]+)', which is not served", message)
    if known is not None:
        return f"`{known[1]}`"
    for pattern, feature in _FEATURES:
        if re.search(pattern, message):
            return feature
    return message


_FEATURES = (
    (r"refers to", "`$ref` to another document or to an `$id` or `$anchor`"),
    (r"leads to no schema", "`$ref` to what is no schema where it stands"),
    (r"leads to itself", "`$ref` that leads to itself"),
    (r"list of 'items' or 'additionalItems'", "a list of `items` in draft 2020-12"),
    (r"'additionalItems' beside", "`additionalItems` beside `allOf` and the like"),
    (r"\$schema is", "a `$schema` that is none of the drafts"),
    (r"oneOf", "`oneOf` whose cases may overlap"),
    (r"schema is false|[Uu]nsatisfiable", "a schema that nothing follows"),
    (r"Expected positive integer", "a bound that is written as a float (`2.0`)"),
    (r"disjoint", "`patternProperties` that may overlap"),
    (r"float range|too many digits", "bounds beyond 64 bits"),
    (r"min/maxProperties|minProperties", "`minProperties` and `maxProperties` beyond what is required"),
    (r"regex parse|escape sequence|the pattern|look-?around", "`pattern` with look-around, back-references or \\cX"),
    (r"Unimplemented keys", "keywords that the library does not know"),
    (r"circular", "`$ref` to itself beside other keywords"),
)  # fmt: skip
