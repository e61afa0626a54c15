"""JSON files of an adapter: of bounded size, and strict."""

from typing import Any

from adapters_store.errors import InvalidAdapter
from adapters_store.files import Folder
from adapters_store.strict_json import NotStrictJSON, parse_object

MAX_JSON_BYTES = 1 << 20


def read_json(folder: Folder, name: str, max_bytes: int | None = None) -> dict[str, Any]:
    """A JSON object from a small file; duplicate keys, NaN and anything but an object are refused."""
    file, max_bytes = folder.open(name), max_bytes or MAX_JSON_BYTES
    if file.size > max_bytes:
        raise InvalidAdapter(
            f"{name} has {file.size:,} bytes; at most {max_bytes:,} are read: leave out what the adapter does not need"
        )
    file.parsed = file.read(0, file.size)
    return parse_json(file.parsed, name)


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    try:
        return parse_object(raw)
    except NotStrictJSON as error:
        raise InvalidAdapter(f"{name} {error}; write it again, as one JSON object in UTF-8") from None
