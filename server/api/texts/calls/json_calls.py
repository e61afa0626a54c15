"""Formats of calls that are objects of JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.api.texts.calls.json_object import CallObject
from server.api.texts.calls.lark import ANY, Spelling, arguments_of, json_of, one_of, quoted, sequence, without
from server.api.texts.incoming import Incoming, Steps
from server.api.texts.speech import Tool
from server.api.texts.told import Told

_SEPARATORS = re.compile(r"[ \t\r\n,;]*")


@dataclass(frozen=True)
class MarkedJson:
    """`begin` object `end`, or where `is_list` a list of objects between them; an empty `end`: it ends with the JSON.

    `inside`: white space that templates write within the markers; `between`: from one call to the next.
    """

    name: str
    begin: str
    end: str = ""
    keys: tuple[str, str] = ("name", "arguments")
    is_list: bool = False
    inside: str = ""
    between: str = ""

    @property
    def markers(self) -> Sequence[str]:
        return [it for it in (self.begin, self.end) if it]

    @property
    def trigger(self) -> str:
        return self.begin

    def read(self, text: Incoming, told: Told, tools: Mapping[str, Tool]) -> Steps[None]:
        while (yield from text.upto([self.begin], told.content)):
            text.attempt(self.begin)
            yield from read_objects(text, told, self.end)
            told.content(text.as_it_was())

    def holds_to(self, tool: Tool) -> bool:
        return True

    def plain(self, spelling: Spelling) -> str:
        return ANY

    def calls(self, tools: Sequence[Tool], most: int, spelling: Spelling, is_begun: bool = False) -> str:
        objects = one_of("call", [_object(it, self.keys) for it in tools])
        begin, end = spelling.text(self.begin), spelling.text(self.inside + self.end)
        inside = spelling.text(self.inside)
        head = inside if is_begun else f"{begin} {inside}"
        if self.is_list:
            several = sequence("call", '", "', most)
            return f'calls: {head} " "? "[" {several} "]" {end}\n{objects}'
        more = f"({spelling.text(self.between)} {begin} {inside} call {end}){{0,{most - 1}}}" if most > 1 else ""
        return f"calls: {head} call {end} {more}\n{objects}"


@dataclass(frozen=True)
class BareJson:
    """An answer that is nothing but objects, behind a marker or without one. Without one they are calls only if their
    names are those of tools."""

    name: str
    marker: str
    keys: tuple[str, str]
    between: str
    trigger = ""

    @property
    def markers(self) -> Sequence[str]:
        return [self.marker]

    def read(self, text: Incoming, told: Told, tools: Mapping[str, Tool]) -> Steps[None]:
        text.attempt()
        if (yield from text.space()) == "{":
            yield from read_objects(text, told, "", frozenset(tools))
        told.content(text.as_it_was())
        while (yield from text.upto([self.marker], told.content)):
            text.attempt(self.marker)
            yield from read_objects(text, told, "")
            told.content(text.as_it_was())

    def holds_to(self, tool: Tool) -> bool:
        return True

    def plain(self, spelling: Spelling) -> str:
        return without("{")

    def calls(self, tools: Sequence[Tool], most: int, spelling: Spelling, is_begun: bool = False) -> str:
        objects = one_of("call", [_object(it, self.keys) for it in tools])
        return f"calls: {spelling.text(self.marker)}? {sequence('call', spelling.text(self.between), most)}\n{objects}"


def read_objects(text: Incoming, told: Told, end: str, known: frozenset[str] | None = None) -> Steps[None]:
    """Calls in an attempt that has begun, and their end. What turns out to be none of it stays in the attempt."""
    if (yield from text.space()) == "[":
        yield from text.literal("[")
        yield from text.space()
    while (yield from CallObject(text, told, known).read()):
        text.attempt()  # what separates calls
        yield from text.run(_SEPARATORS, _nobody)
        if (yield from text.peek()) != "{":
            break
    else:
        return
    if (yield from text.peek()) == "]":
        yield from text.literal("]")
        yield from text.space()
    if not end or (yield from text.literal(end, may_be_cut=True)):
        text.commit()


def _object(tool: Tool, keys: tuple[str, str]) -> str:
    name, arguments = map(json.dumps, keys)
    head = quoted(f"{{{name}: {json.dumps(tool.name)}, {arguments}: ")
    return f'{head} {json_of(arguments_of(tool))} "}}"'


def _nobody(text: str) -> None:
    """Is told."""


_PARAMETERS = ("name", "parameters")
FORMATS = (
    MarkedJson("hermes", "<tool_call>", "</tool_call>", inside="\n", between="\n"),
    MarkedJson("mistral", "[TOOL_CALLS]", is_list=True),
    MarkedJson("granite", "<|tool_call|>", is_list=True),
    MarkedJson("internlm", "<|action_start|><|plugin|>", "<|action_end|>", _PARAMETERS, inside="\n"),
    MarkedJson("nemotron", "<TOOLCALL>", "</TOOLCALL>", is_list=True),
    MarkedJson("tool_calls", "<tool_calls>", "</tool_calls>", is_list=True),
)
BARE_FORMATS = (BareJson("llama3_json", "<|python_tag|>", _PARAMETERS, "; "),)
