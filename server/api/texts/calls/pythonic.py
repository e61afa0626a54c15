"""Calls as Python writes them, in a list: [look_up(place="here"), find(word="it")]."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.api.texts.calls.lark import ANY, Spelling, json_of, one_of, quoted, sequence, without
from server.api.texts.calls.python_literals import json_of_python
from server.api.texts.calls.schema_types import kinds_of, properties_of, says_no_more
from server.api.texts.incoming import Incoming, Steps
from server.api.texts.speech import Tool
from server.api.texts.told import Told

_NAME = re.compile(r"[A-Za-z0-9_.-]*")
_KEY = re.compile(r"\w*")
_OUTSIDE = re.compile(r"[^\"'()\[\]{},]*")  # of strings and brackets
_OPENING, _CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class Pythonic:
    """`begin` list `end`. is_bare: the markers may be left out, if the list is all that the answer is and the first
    name in it is a tool's."""

    name: str
    begin: str
    end: str
    is_bare: bool = False

    @property
    def markers(self) -> Sequence[str]:
        return [self.begin, self.end]

    @property
    def trigger(self) -> str:
        return "" if self.is_bare else self.begin

    def read(self, text: Incoming, told: Told, tools: Mapping[str, Tool]) -> Steps[None]:
        if self.is_bare:
            text.attempt()
            yield from text.space()
            yield from self._list(text, told, frozenset(tools))
            told.content(text.as_it_was())
        while (yield from text.upto([self.begin], told.content)):
            text.attempt(self.begin)
            yield from text.space()
            yield from self._list(text, told, None)
            told.content(text.as_it_was())

    def _list(self, text: Incoming, told: Told, known: frozenset[str] | None) -> Steps[None]:
        """What turns out to be none stays in the attempt."""
        if not (yield from text.literal("[")):
            return
        has_more = True
        while has_more:
            if not (yield from self._call(text, told, known)):
                return
            text.attempt()
            yield from text.space()
            has_more = yield from text.literal(",")
        if not (yield from text.literal("]")):
            return
        text.attempt()
        yield from text.space()
        if (yield from text.literal(self.end, may_be_cut=True)) or self.is_bare:
            text.commit()

    def _call(self, text: Incoming, told: Told, known: frozenset[str] | None) -> Steps[bool]:
        """Whether one was read to its end; it is committed to from its first argument on."""
        yield from text.space()
        name = yield from text.run(_NAME)
        if not name or (known is not None and name not in known) or not (yield from text.literal("(")):
            return False
        count = 0
        while (yield from text.space()) != ")":
            key = yield from text.run(_KEY)
            if not key or (yield from text.space()) != "=":
                return False
            text.one()
            if not count:
                text.commit()
                told.begin_call(name)
            raw: list[str] = []
            if not (yield from _raw_value(text, raw)):
                return False
            value = "".join(raw).strip()
            told.arguments(f"{', ' if count else '{'}{json.dumps(key)}: {json_of_python(value) or json.dumps(value)}")
            count += 1
            if (yield from text.peek()) == ",":
                text.one()
        text.one()
        if not count:
            text.commit()
            told.begin_call(name)
        told.arguments("}" if count else "{}")
        return True

    # -- the grammar ---

    def holds_to(self, tool: Tool) -> bool:
        return says_no_more(tool.parameters)

    def plain(self, spelling: Spelling) -> str:
        return without("[") if self.is_bare else ANY

    def calls(self, tools: Sequence[Tool], most: int, spelling: Spelling, is_begun: bool = False) -> str:
        rules: list[str] = []
        calls = one_of("call", [self._lark(index, it, rules) for index, it in enumerate(tools)])
        begin, end = spelling.text(self.begin), spelling.text(self.end)
        begin, end = ("", "") if self.is_bare else ("" if is_begun else begin, end)
        head = f'calls: {begin} "[" {sequence("call", QUOTED_COMMA, most)} "]" {end}'
        return "\n".join([head, calls, *rules])

    def _lark(self, index: int, tool: Tool, rules: list[str]) -> str:
        """Arguments in the order of the schema's properties, those that are not required perhaps."""
        properties = list(properties_of(tool.parameters).items())
        required = tool.parameters.get("required")
        for number, (key, schema) in enumerate(properties):
            rule, following = f"{index}_{number}", f"{index}_{number + 1}"
            skip_first, skip = (
                ("", "")
                if isinstance(required, list) and key in required
                else (f" | first_{following}", f" | more_{following}")
            )
            value = f"{quoted(key + '=')} {_value(schema, tool.parameters)}"
            rules.append(f"argument_{rule}: {value}")
            rules.append(f"first_{rule}: argument_{rule} more_{following}{skip_first}")
            rules.append(f'more_{rule}: ", " argument_{rule} more_{following}{skip}')
        rules += [f'first_{index}_{len(properties)}: ""', f'more_{index}_{len(properties)}: ""']
        return f'{quoted(tool.name + "(")} first_{index}_0 ")"'


QUOTED_COMMA = '", "'


def _raw_value(text: Incoming, raw: list[str]) -> Steps[bool]:
    """Up to the comma or bracket behind it, which is not taken. Whether that came."""
    depth = 0
    while True:
        yield from text.run(_OUTSIDE, raw.append)
        char = yield from text.peek()
        if not char:
            return False
        if char in ('"', "'"):
            if not (yield from text.quoted(raw.append, char)):
                return False
            continue
        if depth == 0 and (char == "," or char in _CLOSING):
            return True
        depth += (char in _OPENING) - (char in _CLOSING)
        raw.append(text.one())


def _value(schema: Any, root: Mapping[str, Any]) -> str:
    kinds = kinds_of(schema, root)
    if kinds == {"boolean"}:
        return '("True" | "False")'
    if kinds == {"null"}:
        return '"None"'
    its = dict(schema) if isinstance(schema, Mapping) else {}
    return json_of({**its, **{name: root[name] for name in ("$defs", "definitions") if name in root}})


FORMATS = (Pythonic("lfm2", "<|tool_call_start|>", "<|tool_call_end|>"),)
BARE_FORMATS = (Pythonic("pythonic", "<|python_start|>", "<|python_end|>", is_bare=True),)
