"""JSON that strangers wrote: of bounded size, an object, no key twice, no NaN."""

import json
from typing import Any

from adapters_store.errors import InvalidAdapter, shown
from adapters_store.files import Folder

MAX_JSON_BYTES = 1 << 20


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """A JSON object from a small file; duplicate keys, NaN and anything but an object are refused."""
    file = folder.open(name)
    if file.size > MAX_JSON_BYTES:
        raise InvalidAdapter(f"{name} has {file.size:,} bytes; at most {MAX_JSON_BYTES:,} are read")
    return parse_json(file.read(0, file.size), name)


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise InvalidAdapter(f"{name} has the key {shown(twice)!r} twice")
        return found

    def no_constant(token: str) -> Any:
        raise InvalidAdapter(f"{name} holds {token}, which is not JSON")

    try:
        value = json.loads(raw, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"{name} is not valid JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise InvalidAdapter(f"{name} must hold a JSON object, not {type(value).__name__}")
    return value
