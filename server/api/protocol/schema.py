"""JSON schemas of what pydantic does not know: limits that are the server's, and records that are not pydantic's."""

from collections.abc import Mapping
from typing import Any

import msgspec
from pydantic.config import JsonDict

from adapters_store.file_names import NAMES as ADAPTER_FILES

_MARK = "limit:"


def limit(name: str) -> str:
    """Stands in a schema for a number (or a name) that each server has its own of, until the document is made."""
    return _MARK + name


def filled(schema: Any, values: Mapping[str, Any]) -> Any:
    """The schema with values for its limits."""
    if isinstance(schema, str) and schema.startswith(_MARK):
        return values[schema.removeprefix(_MARK)]
    if isinstance(schema, dict):
        return {key: filled(value, values) for key, value in schema.items()}
    return [filled(value, values) for value in schema] if isinstance(schema, list) else schema


def schema_of(record: type[msgspec.Struct]) -> dict[str, Any]:
    """Of a record, those in it included."""
    (schema,), parts = msgspec.json.schema_components([record], ref_template="{name}")

    def inlined(it: Any) -> Any:
        if isinstance(it, dict):
            return inlined(parts[it["$ref"]]) if "$ref" in it else {key: inlined(value) for key, value in it.items()}
        return [inlined(value) for value in it] if isinstance(it, list) else it

    made: dict[str, Any] = inlined(schema)
    return made


TOKEN_ID: JsonDict = {"type": "integer", "minimum": 0, "exclusiveMaximum": limit("vocab_size")}
TOKEN_IDS: JsonDict = {"type": "array", "items": TOKEN_ID, "maxItems": limit("max_model_len")}
ADAPTER_NAME: JsonDict = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"}

FILE_NAME: JsonDict = {
    "type": "string",
    "anyOf": [
        {"enum": [*sorted(ADAPTER_FILES)]},
        {"pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]{0,100}\.safetensors(\.index\.json)?$"},
    ],
}


def at_most(name: str, is_list: bool = False) -> JsonDict:
    """What a field says beside its type."""
    return {"maxItems" if is_list else "maximum": limit(name)}


def given(**fields: Any) -> JsonDict:
    """Of an object: these fields are there, and as their schemas say."""
    return {"required": [*fields], "properties": {**fields}}


def one_of(**fields: Any) -> JsonDict:
    """Of an object: one of these fields is not there, or as its schema says. (Said without a `not`: tools that make
    requests out of a document find it hard to be told only what is not.)"""
    return {"anyOf": [{"properties": {name: schema}} for name, schema in fields.items()]}


NOTHING: JsonDict = {"type": "null"}
NOT_TRUE: JsonDict = {"enum": [None, False]}
SOMETHING: JsonDict = {"not": {"type": "null"}}
