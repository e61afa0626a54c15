"""Values as Python writes them, to JSON: strings, numbers, True, False, None, lists, tuples and dictionaries of these.

Nothing is evaluated.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]++|\\.)*+"|'(?:[^'\\]++|\\.)*+')
    |(?P<number>[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<word>[A-Za-z]+)|(?P<mark>[\[\](){},:]))""",
    re.DOTALL | re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{1,3}|.)", re.DOTALL)
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_DEEPEST = 64
_MOST_DIGITS = 1000
_CLOSED_BY = {"[": "]", "(": ")", "{": "}"}


def json_of_python(text: str) -> str | None:
    """None: it is no such value, or one that is nested too deep."""
    tokens = _tokens(text)
    try:
        value = _value(tokens, next(tokens), 0)
        return None if next(tokens, None) else json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, StopIteration, RuntimeError):
        return None


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at, text = 0, text.strip()
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None or found.lastgroup is None:
            raise ValueError(at)
        yield found.lastgroup, found[found.lastgroup]
        at = found.end()


def _value(tokens: Iterator[tuple[str, str]], token: tuple[str, str], depth: int) -> Any:
    kind, text = token
    if depth > _DEEPEST:
        raise ValueError("too deep")
    if kind == "string":
        return _unescaped(text[1:-1])
    if kind == "number":
        return _number(text)
    if kind == "word" and text in _WORDS:
        return _WORDS[text]
    if text in _CLOSED_BY:
        items = list(_items(tokens, _CLOSED_BY[text], depth + 1, has_keys=text == "{"))
        return dict(items) if text == "{" else items
    raise ValueError(text)


def _items(tokens: Iterator[tuple[str, str]], end: str, depth: int, has_keys: bool) -> Iterator[Any]:
    token = next(tokens)
    while token[1] != end or token[0] != "mark":
        item = _value(tokens, token, depth)
        if has_keys:
            if next(tokens) != ("mark", ":") or not isinstance(item, str):
                raise ValueError("a key")
            item = item, _value(tokens, next(tokens), depth)
        yield item
        token = next(tokens)
        if token == ("mark", ","):
            token = next(tokens)
        elif token != ("mark", end):
            raise ValueError(token[1])


def _number(text: str) -> int | float:
    if len(text) > _MOST_DIGITS:
        raise ValueError("too long")
    digits = text.replace("_", "")
    return float(digits) if set(digits) & set(".eE") else int(digits)


def _unescaped(text: str) -> str:
    unescaped = _ESCAPE.sub(_character, text) if "\\" in text else text
    unescaped.encode()  # half of a surrogate pair has no UTF-8
    return unescaped


def _character(found: re.Match[str]) -> str:
    escape = found[1]
    if escape[0] in "xuU" and len(escape) > 1:
        return chr(int(escape[1:], 16))
    if escape[0] in "01234567":
        return chr(int(escape, 8))
    return _LETTERS.get(escape, escape if escape in "\\'\"" else f"\\{escape}")
