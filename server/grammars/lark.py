"""Grammars in Lark: what a client's may say, and schemas that stand in ours.

A grammar can name control tokens, which would end a turn or begin another, and options of the library. A client's may
not. Told apart as the library's own lexer does it, which knows by its first character what something is.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from server.grammars.refused import GrammarRefused, shown
from server.grammars.structure import check_structure

_STRING = r'"(?:[^"\\\n]|\\.)*+"'
_REGEX = r"/(?![/])(?:[^/\\]|\\.)++/"
_COMMENT = r"(?:\#|//)[^\n]*+"
# what may be refused, where it stands in neither a string, a regular expression nor a comment
_OUTSIDE = re.compile(
    rf"{_STRING}|{_REGEX}|{_COMMENT}"
    r"|(?P<token><)|(?P<reference>@)|%(?P<directive>[a-zA-Z_]*+)(?:[ \t]++(?P<path>[a-zA-Z0-9_.]++))?"
    r"|(?P<negation>~(?![ \t]*+[0-9]))|\b(?P<attribute>[a-z_]++)[ \t]*+=|(?P<unfinished>[\"/])"
)
_SERVED_ATTRIBUTES = ("suffix", "capture")  # `lazy` has no value
_JSON = re.compile(rf"{_STRING}|{_REGEX}|{_COMMENT}|(?P<schema>%json\b)")
_SPACE = re.compile(r"\s*+")
_DECODER = json.JSONDecoder()


def check_foreign(lark: str) -> None:
    """Raises GrammarRefused for what a client's grammar may not say."""
    for match in _OUTSIDE.finditer(lark):
        kind, found = match.lastgroup, match.group()
        if kind == "token":
            raise GrammarRefused(
                "the grammar names a token of the vocabulary (<...>), which could be a control token; write its text "
                'as a string, such as "<b>"'
            )
        if kind == "reference":
            raise GrammarRefused("the grammar refers to another one (@...), and there is none; write it as a rule")
        if kind == "negation":
            raise GrammarRefused("the grammar uses ~ (not), which is not served; name what may come instead")
        if kind == "attribute" and match["attribute"] not in _SERVED_ATTRIBUTES:
            raise GrammarRefused(
                f"the grammar sets {shown(match['attribute'])!r} of a rule, which is not served; "
                "lazy, suffix and capture are, and sampling is for fields of the request"
            )
        if kind == "unfinished":
            raise GrammarRefused(
                f"the grammar has a {'string' if found == chr(34) else 'regular expression'} without an end",
                "invalid_grammar",
            )
        if match["directive"] is not None:
            _check_directive(match["directive"], match["path"] or "")


def _check_directive(name: str, path: str) -> None:
    if name == "ignore" or (name == "import" and re.fullmatch(r"common(\.[A-Z_]+)?", path)):
        return
    if name == "import":
        raise GrammarRefused("the grammar imports something other than common; write what it needs as rules")
    if name == "json":
        raise GrammarRefused("the grammar holds a JSON schema (%json); send a schema as such, not inside a grammar")
    raise GrammarRefused(f"the grammar says %{shown(name)}, which is not served; %ignore and %import common are")


def with_schemas(lark: str, served: Callable[[Any], Any]) -> str:
    """A grammar of ours with each schema in it (`%json {...}`), which is a tool's, as it is `served`. Raises
    GrammarRefused."""
    pieces, place = [], 0
    for begin, end, schema in schemas_in(lark):
        pieces += [lark[place:begin], json.dumps(served(schema))]
        place = end
    return "".join([*pieces, lark[place:]])


def schemas_in(lark: str) -> Iterator[tuple[int, int, Any]]:
    """Where each begins and ends, and what it is. Raises GrammarRefused."""
    place = 0
    while (match := _JSON.search(lark, place)) is not None:
        place = match.end()
        if match["schema"] is None:
            continue
        begin = _SPACE.match(lark, place).end()  # type: ignore[union-attr]
        try:
            schema, place = _DECODER.raw_decode(lark, begin)
        except RecursionError:
            raise GrammarRefused("the schema of a tool nests too deeply", is_of_tools=True) from None
        try:
            check_structure(lark[begin:place], "the schema")
        except GrammarRefused as refusal:
            raise refusal.of_tool(schema) from None
        yield begin, place, schema


def literal(text: str) -> str:
    """The text as a string of Lark's. Raises GrammarRefused for halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise GrammarRefused(
            f"{shown(text)!r} is not UTF-8: it has half of a surrogate pair", "invalid_grammar"
        ) from None
    # a control character is spelled \u00xx by JSON, and the library reads that
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
