"""From what a request says to one grammar for llguidance.

    start: <before> ( <opening> space? @answer | space? @instead )

Each part is a grammar of its own, so that no rule of a client's can mean one of ours.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from server.grammars import lark, schemas
from server.grammars.limits import MAX_CHOICES, MAX_GRAMMAR_CHARS, MAX_SPACE_BEFORE
from server.grammars.refused import GrammarRefused
from server.grammars.source import GrammarSource

# Bytes that are certain would else be forced as the tokenizer writes them. It writes a text that spells a control token
# as that token, which would end the answer.
_OPTIONS = '%llguidance {"no_forcing": true}\n'
_SPACE = rf"SPACE: /[ \n\r\t]{{1,{MAX_SPACE_BEFORE}}}/" + "\n"
_SLASH = re.compile(r"\\.|/", re.DOTALL)
Part = dict[str, Any]


def composed(source: GrammarSource, in_lark: Callable[[str], str]) -> str:
    """`in_lark`: what makes Lark of GBNF, and leaves Lark as it is. Raises GrammarRefused."""
    parts: list[Part] = [{"name": "answer", **_answer(source, in_lark)}]
    if source.instead:
        parts.append({"name": "instead", "lark_grammar": lark.with_schemas(source.instead, _served_as_ours)})
    space = "SPACE? " if source.kind == "json_schema" else ""
    ways = [f"{'opening ' if source.opening else ''}{space}@answer", *[f"{space}@instead"] * bool(source.instead)]
    rules = [f"start: {'before ' if source.before else ''}({' | '.join(ways)})"]
    rules += [
        f"{name}: {lark.with_schemas(text, _served_as_ours)}"
        for name, text in (("before", source.before), ("opening", source.opening))
        if text
    ]
    main = {"lark_grammar": "\n".join([_OPTIONS, *rules, _SPACE if space else ""])}
    grammar = json.dumps({"grammars": [main, *parts]}, ensure_ascii=False)
    if len(grammar) > MAX_GRAMMAR_CHARS:
        raise GrammarRefused(
            f"the grammar has {len(grammar):,} characters when it is composed; {MAX_GRAMMAR_CHARS:,} may be"
        )
    return grammar


def _answer(source: GrammarSource, in_lark: Callable[[str], str]) -> Part:
    if source.kind == "json_schema":
        return {"json_schema": schemas.served(schemas.parse(source.text))}
    if source.kind == "regex":
        return {"lark_grammar": f"start: {_regex(source.text)}"}
    if source.kind == "choice":
        return {"lark_grammar": f"start: CHOICE\nCHOICE: {' | '.join(map(lark.literal, _choices(source.text)))}"}
    if source.kind == "ebnf":
        grammar = in_lark(source.text)
        lark.check_foreign(grammar)
        return {"lark_grammar": grammar}
    return {"lark_grammar": lark.with_schemas(source.text, _served_as_ours)}


def _served_as_ours(schema: Any) -> dict[str, Any]:
    """A tool's schema in a grammar of ours, which may say how its JSON is spelled (a template's way)."""
    own = _own(schema)
    try:
        served = schemas.served(own)
    except GrammarRefused as refusal:
        raise refusal.of_tool(own) from None
    return served if own is schema else served | {"x-guidance": schema["x-guidance"] | schemas.NO_ESCAPED_LETTERS}


def _own(schema: Any) -> Any:
    """What the client said."""
    if not isinstance(schema, dict) or "x-guidance" not in schema:
        return schema
    return {key: it for key, it in schema.items() if key != "x-guidance"}


def tool_schemas(source: GrammarSource) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each as the client said it, and as it is served. Raises GrammarRefused."""
    ours = source.text if source.kind == "lark" else source.instead
    for _, _, schema in lark.schemas_in(ours):
        yield _own(schema), _served_as_ours(schema)


def _regex(text: str) -> str:
    if not text:
        return '""'
    return "/" + _SLASH.sub(lambda match: r"\/" if match.group() == "/" else match.group(), text) + "/"


def _choices(text: str) -> list[str]:
    try:
        choices = msgspec.json.decode(text, type=list[str])
    except (msgspec.DecodeError, UnicodeEncodeError):
        raise GrammarRefused("the choices are no list of texts", "invalid_grammar") from None
    if not choices or not all(choices):
        raise GrammarRefused("there must be at least one choice, and none may be empty", "invalid_grammar")
    if len(choices) > MAX_CHOICES:
        raise GrammarRefused(f"there are {len(choices):,} choices; at most {MAX_CHOICES:,} are served")
    return choices
