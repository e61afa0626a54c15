"""Of which kinds a value may be by its JSON Schema, for formats that write values without quotes."""

from collections.abc import Mapping
from typing import Any

ALL = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})
_OF_PROPERTIES = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema"}
_TOLD = {"title", "description", "default", "examples"}  # people
_DEEPEST = 16


def properties_of(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def kinds_of(schema: Any, root: Mapping[str, Any], depth: int = 0) -> frozenset[str]:
    """Empty where the schema does not say."""
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return frozenset()
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind}) & ALL
    if isinstance(kind, list):
        return frozenset(it for it in kind if isinstance(it, str)) & ALL
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return frozenset(map(_kind_of, values))
    for name in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(name), list):
            return frozenset().union(*(kinds_of(it, root, depth + 1) for it in schema[name][:64]))
    return kinds_of(_referred(schema.get("$ref"), root), root, depth + 1)


def says_no_more(schema: Mapping[str, Any]) -> bool:
    """Whether it says of an object which properties it has, and nothing else."""
    required = schema.get("required", [])
    if not isinstance(required, list) or not set(map(str, required)) <= set(properties_of(schema)):
        return False
    return not set(schema) - _OF_PROPERTIES - _TOLD and schema.get("type", "object") == "object"


def is_any_string_or_none(schema: Any, root: Mapping[str, Any]) -> bool:
    """Whether it takes either every string, those that it lists, or none at all."""
    kinds = kinds_of(schema, root)
    if not isinstance(schema, Mapping) or not kinds:
        return False
    if "string" not in kinds or all(isinstance(it, str) for it in schema.get("enum", [0])):
        return True
    return kinds == {"string"} and not set(schema) - {"type"} - _TOLD


def _referred(ref: Any, root: Mapping[str, Any]) -> Any:
    if not isinstance(ref, str) or not ref.startswith("#/"):
        return None
    found: Any = root
    for part in ref[2:].split("/"):
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def _kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    kinds = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return kinds.get(type(value), "null")
