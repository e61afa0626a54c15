"""JSON inside a body: texts that hold it, and objects that are handed on as they are."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from adapters_store.strict_json import NotStrictJSON, parse_object
from server.errors import InvalidRequest

MAX_NESTED = 10_000  # lists and objects in one text
# possessive, and an unfinished string ends with the text: linear whatever is sent
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)

# a truth value is a number to Python, so it comes first
_NAMES: dict[type | tuple[type, ...], str] = {
    bool: "true or false", (int, float): "a number", str: "a text", list: "a list", dict: "an object",
}  # fmt: skip


def without_strings(raw: bytes) -> bytes:
    """JSON, with a quote in place of each string."""
    return _STRING.sub(b'"', raw)


def name_of_type(value: Any) -> str:
    """For what is said of it."""
    return next((name for kind, name in _NAMES.items() if isinstance(value, kind)), "null")


def is_deeper(value: Any, most: int) -> bool:
    """Whether it has lists or objects more than so many deep in one another, itself included."""
    level: list[Any] = [value] if isinstance(value, dict | list) else []
    for _ in range(most):
        inner = [it.values() if isinstance(it, dict) else it for it in level]
        level = [it for items in inner for it in items if isinstance(it, dict | list)]
    return bool(level)


def refuse_too_much(texts: Sequence[str], what: str, param: str) -> None:
    """Of structure in JSON texts, before it is built. Raises InvalidRequest."""
    if sum(text.count("[") + text.count("{") for text in texts) <= MAX_NESTED:
        return
    structures = [without_strings(text.encode(errors="replace")) for text in texts]
    nested = sum(it.count(b"[") + it.count(b"{") for it in structures)
    if nested > MAX_NESTED:
        raise InvalidRequest(f"{what} has {nested:,} lists and objects; at most {MAX_NESTED:,} are read", param=param)


def object_in(text: str) -> dict[str, Any] | None:
    """What a client had from a model; None: it is none. Raises RecursionError."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.MsgspecError, UnicodeEncodeError):
        return None
    return value if isinstance(value, dict) else None


def strict_object_in(text: str, param: str, code: str) -> dict[str, Any]:
    """What a client wrote itself: nothing of it may be ambiguous. Raises InvalidRequest, by this code."""
    refuse_too_much([text], f"the text in {param}", param)
    try:
        return parse_object(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(f"the text in {param} is not valid Unicode", param=param, code=code) from None
    except NotStrictJSON as error:
        raise InvalidRequest(f"the text in {param} {error}", param=param, code=code) from None


def text_of(value: Mapping[str, Any], param: str, code: str) -> str:
    """Raises InvalidRequest, by this code, for a number that JSON has no word for: 1e999 is read as infinite."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise InvalidRequest(f"{param} holds a number that is too large", param=param, code=code) from None
