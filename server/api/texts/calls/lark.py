"""Texts and schemas as llguidance's dialect of Lark has them."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from server.api.texts.speech import Tool

ANY = r"/(.|\n)*/"  # text of any length, with no control token in it
_AS_TEMPLATES = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_SPECIAL_IN_REGEX = re.compile(r"[^A-Za-z0-9_]")


class Spelling:
    """How a tokenizer spells markers: those that are control tokens to the grammar are such tokens, others letters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        # as llguidance has it; a plain text matches neither
        self._ids = {
            it.content: token
            for token, it in added.items()
            if it.content and (it.special or (it.content.startswith("<") and it.content.endswith(">")))
        }
        self._special = frozenset(token for token, it in added.items() if it.special)

    def has_token(self, marker: str) -> bool:
        return marker in self._ids

    def special_among(self, markers: Iterable[str]) -> frozenset[int]:
        """Those that decoders leave out unless they are kept."""
        return frozenset(self._ids[it] for it in markers if it in self._ids) & self._special

    def text(self, text: str) -> str:
        """An expression for exactly this text."""
        parts = self._split(text)
        return " ".join(f"<[{self._ids[it]}]>" if it in self._ids else quoted(it) for it in parts)

    def until(self, rule: str, end: str) -> str:
        """A rule for any text up to the first `end`, and that."""
        first = self._split(end)[:1]
        if first and first[0] in self._ids:
            return f"{rule}: {ANY} {self.text(end)}"
        return f"{rule}[lazy]: /(.|\\n)*{in_regex(end)}/"

    def _split(self, text: str) -> list[str]:
        """At the control tokens, of two that begin at one place the longer one."""
        parts, begin, at = [], 0, 0
        while at < len(text):
            found = max((it for it in self._ids if text.startswith(it, at)), key=len, default="")
            if found:
                parts += [text[begin:at], found]
                begin = at + len(found)
            at += len(found) or 1
        return [it for it in (*parts, text[begin:]) if it]


def quoted(text: str) -> str:
    """A string literal, from which no text gets out."""
    return json.dumps(text)


def in_regex(text: str) -> str:
    """For between the slashes of one."""
    return _SPECIAL_IN_REGEX.sub(lambda found: f"\\x{{{ord(found[0]):x}}}", text)


def without(first: str) -> str:
    """An expression for any text that does not begin so, white space aside."""
    return f"/(\\s*([^\\s{in_regex(first)}](.|\\n)*)?)?/"


def json_of(schema: Mapping[str, Any]) -> str:
    """An expression for what follows a schema, spaced as templates write JSON."""
    return f"%json {json.dumps({**schema, 'x-guidance': _AS_TEMPLATES})}"


def arguments_of(tool: Tool) -> Mapping[str, Any]:
    """The schema of its arguments, which are an object. A tool that says nothing of any has none."""
    if not tool.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return tool.parameters if "type" in tool.parameters else {**tool.parameters, "type": "object"}


def sequence(call: str, between: str, most: int) -> str:
    """One to `most`; `between` is an expression, or empty."""
    return f"{call} ({between} {call}){{0,{most - 1}}}" if most > 1 else call


def one_of(rule: str, expressions: Sequence[str]) -> str:
    """A rule for one of the expressions, each in a rule of its own."""
    lines = [f"{rule}_{index}: {it}" for index, it in enumerate(expressions)]
    return "\n".join([f"{rule}: {' | '.join(f'{rule}_{index}' for index in range(len(expressions)))}", *lines])
