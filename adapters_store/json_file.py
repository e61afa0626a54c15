"""JSON files of an adapter: of bounded size, and strict."""

from typing import Any

from adapters_store.errors import InvalidAdapter
from adapters_store.files import Folder
from adapters_store.strict_json import NotStrictJSON, parse_object

MAX_JSON_BYTES = 1 << 20


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """A JSON object from a small file; duplicate keys, NaN and anything but an object are refused."""
    file = folder.open(name)
    if file.size > MAX_JSON_BYTES:
        raise InvalidAdapter(f"{name} has {file.size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
    return parse_json(file.read(0, file.size), name)


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    try:
        return parse_object(raw)
    except NotStrictJSON as error:
        raise InvalidAdapter(f"{name} {error}") from None
