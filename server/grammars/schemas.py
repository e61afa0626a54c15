"""JSON Schemas as they are handed to the library: what it does not know and need not is left out, what it gets wrong is
refused."""

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from server.grammars import numbers, patterns, references
from server.grammars.limits import MAX_ENUM_VALUES, MAX_INDENT, MAX_PROPERTIES, MAX_SPACES
from server.grammars.refused import GrammarRefused, shown

Schema = dict[str, Any] | bool
Place = tuple["Place", str | int] | None  # where a schema stands: below which, and as what
# formats that are enforced; the standard has others as annotations, which say nothing about what is valid
ENFORCED_FORMATS = frozenset({
    "date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
})  # fmt: skip
_ONE_BELOW = ("additionalItems", "additionalProperties", "items")
_LISTS_BELOW = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
_BESIDE = frozenset({"allOf", "anyOf", "oneOf", "$ref", "const", "enum"})
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_MAPS_BELOW = ("$defs", "definitions", "patternProperties", "properties")
_NOT_SERVED = {
    "not": "name what may come instead",
    "if": "use anyOf with the cases written out",
    "contains": "use items",
    "minContains": "use minItems",
    "maxContains": "use maxItems",
    "propertyNames": "use patternProperties with additionalProperties: false",
    "dependentRequired": "use anyOf with the cases written out",
    "dependentSchemas": "use anyOf with the cases written out",
    "dependencies": "use anyOf with the cases written out",
    "unevaluatedItems": "use items",
    "uniqueItems": "leave it out and look at the answer",
    "unevaluatedProperties": "use additionalProperties",
    "$dynamicRef": "use $ref",
    "$recursiveRef": "use $ref",
}
# others have keywords that mean something else, or that no later one has
_DIALECTS = re.compile(r"https?://json-schema\.org/(draft-0[467]/schema|draft/(2019-09|2020-12)/schema)#?", re.ASCII)
_WITH_LISTS_OF_ITEMS = re.compile(r"https?://json-schema\.org/(draft-0[467]|draft/2019-09)/schema#?")
# \u0061 for a: a property could be named once more, past what is said of it
NO_ESCAPED_LETTERS = {"json_allowed_escapes": 'nrbtf\\"'}
WHITESPACE = rf"[\x20\x09]{{1,{MAX_SPACES}}}|\x0D?\x0A[\x20\x09]{{0,{MAX_INDENT}}}"


def parse(text: str) -> Schema:
    """Raises GrammarRefused."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        raise GrammarRefused("the schema is no JSON", "invalid_grammar") from None
    return value  # type: ignore[no-any-return]


def served(schema: Any) -> dict[str, Any]:
    """The schema with what tells the library how JSON is spelled. Raises GrammarRefused."""
    if not isinstance(schema, dict | bool):
        raise GrammarRefused("the schema is neither an object nor true or false", "invalid_grammar")
    if schema is False:
        raise GrammarRefused("the schema is false, and nothing follows that", "invalid_grammar")
    if schema is True:
        schema = {}
    if "x-guidance" in schema:
        raise GrammarRefused("the schema has x-guidance, which is no keyword of JSON Schema; leave it out")
    has_lists_of_items = _check_dialect(schema.get("$schema"))
    num_properties = num_values = 0
    found: list[str] = []
    nodes: list[dict[str, Any]] = []
    for it, place in _below(schema):
        nodes.append(it)
        num_properties += _length(it, "properties")
        num_values += _length(it, "enum")
        if num_properties > MAX_PROPERTIES:
            raise GrammarRefused(f"the schema has more than {MAX_PROPERTIES:,} properties")
        if num_values > MAX_ENUM_VALUES:
            raise GrammarRefused(f"the schema has more than {MAX_ENUM_VALUES:,} values in enums")
        try:
            _require_served(it, has_lists_of_items)
            if isinstance(it.get("$ref"), str):
                references.check_local(it["$ref"])
                found.append(it["$ref"])
            _settle(it)
        except GrammarRefused as refusal:
            raise refusal.at(_pointer(place)) from None
    numbers.check(nodes)
    references.check_ends(schema, found, {id(it) for it in nodes})
    return {"x-guidance": {"whitespace_pattern": WHITESPACE, **NO_ESCAPED_LETTERS}, **schema}


def _check_dialect(dialect: Any) -> bool:
    """Whether `items` may be a list in it. Raises GrammarRefused."""
    if dialect is None:
        return False
    if not isinstance(dialect, str) or _DIALECTS.fullmatch(dialect) is None:
        raise GrammarRefused(
            f"the schema's $schema is {shown(str(dialect))!r}; drafts 4, 6, 7, 2019-09 and 2020-12 are served"
        )
    return _WITH_LISTS_OF_ITEMS.fullmatch(dialect) is not None


def _below(schema: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Place]]:
    """Every schema in it, itself first, and where it stands."""
    todo: list[tuple[Any, Place]] = [(schema, None)]
    while todo:
        it, place = todo.pop()
        if not isinstance(it, dict):  # true, false, or nothing that the library takes
            continue
        yield it, place
        todo += [(it[key], (place, key)) for key in _ONE_BELOW if key in it]
        for key in _LISTS_BELOW:
            if isinstance(it.get(key), list):
                todo += [(below, ((place, key), index)) for index, below in enumerate(it[key])]
        for key in _MAPS_BELOW:
            if isinstance(it.get(key), dict):
                todo += [(below, ((place, key), name)) for name, below in it[key].items()]


def _pointer(place: Place) -> str:
    """As a JSON pointer."""
    parts: list[str] = []
    while place is not None:
        place, name = place
        parts.append(str(name).replace("~", "~0").replace("/", "~1"))
    return "/".join(["#", *reversed(parts)])


def _length(schema: dict[str, Any], key: str) -> int:
    value = schema.get(key)
    return len(value) if isinstance(value, list | dict) else 0


def _settle(schema: dict[str, Any]) -> None:
    """What need not be enforced is left out, and patterns are in the library's words."""
    form = schema.get("format")
    if isinstance(form, str) and form not in ENFORCED_FORMATS:
        del schema["format"]
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    for key in _COUNTS:  # 2.0 is 2
        if isinstance(schema.get(key), float) and schema[key].is_integer():
            schema[key] = int(schema[key])
    if isinstance(schema.get("pattern"), str):
        schema["pattern"] = patterns.in_rust(schema["pattern"])
    if isinstance(schema.get("patternProperties"), dict):
        schema["patternProperties"] = {patterns.in_rust(key): it for key, it in schema["patternProperties"].items()}


def _require_served(schema: dict[str, Any], has_lists_of_items: bool) -> None:
    """What would not be enforced is refused, though the library might think otherwise. Raises GrammarRefused."""
    for key, remedy in _NOT_SERVED.items():
        if key in schema and not (key == "uniqueItems" and schema[key] is False):
            raise GrammarRefused(f"the schema has {key!r}, which is not served; {remedy}")
    types = schema.get("type")
    for name in types if isinstance(types, list) else [types]:
        if isinstance(name, str) and name not in _TYPES:
            raise GrammarRefused(
                f"the schema has the type {shown(name)!r}, and there is none such; {', '.join(_TYPES)} are",
                "invalid_grammar",
            )
    if not has_lists_of_items and (isinstance(schema.get("items"), list) or "additionalItems" in schema):
        raise GrammarRefused(
            "the schema has a list of 'items' or 'additionalItems', which drafts before 2020-12 have; use prefixItems "
            "and items, or name its draft in $schema"
        )
    if "additionalItems" in schema and not _BESIDE.isdisjoint(schema):
        raise GrammarRefused(
            "the schema has 'additionalItems' beside allOf, anyOf, oneOf, $ref, const or enum, which is not served; "
            "use prefixItems and items, as draft 2020-12 has them"
        )
    least, required = schema.get("minProperties"), schema.get("required")
    num_required = len(required) if isinstance(required, list) else 0
    # the same key twice would count as two properties
    if isinstance(least, int | float) and least > num_required + 1:
        raise GrammarRefused(
            f"the schema has 'minProperties' {least} and {num_required} required properties, and at most one more is "
            "served; name more of them as required"
        )
