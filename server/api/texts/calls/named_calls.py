"""Formats that write a call's name outside of the JSON of its arguments."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.api.texts.calls.lark import ANY, Spelling, arguments_of, json_of, one_of, quoted
from server.api.texts.incoming import Incoming, Steps
from server.api.texts.speech import Tool
from server.api.texts.told import Told

_NAME = re.compile(r"[A-Za-z0-9_.-]*")
_NUMBER = re.compile(r"[0-9]*")


@dataclass(frozen=True)
class NamedJson:
    """`section` and in it calls, and `section_end`: `begin` name `then` arguments `end`. White space between any of
    these is passed over; `between` is what templates write from one call to the next.

    `counts`: a colon and the call's number follow the name, as in functions.look_up:0. `id_marker`: where templates may
    write an id behind the name.
    """

    name: str
    begin: str
    then: str
    end: str = ""
    section: str = ""
    section_end: str = ""
    between: str = ""
    counts: bool = False
    id_marker: str = ""

    @property
    def markers(self) -> Sequence[str]:
        """Without the letters among them."""
        texts = (self.section, self.begin, self.then, self.id_marker, self.end, self.section_end)
        return [it for text in texts for it in _MARKER.findall(text)]

    @property
    def trigger(self) -> str:
        return self.section or self.begin

    def read(self, text: Incoming, told: Told, tools: Mapping[str, Tool]) -> Steps[None]:
        while (yield from text.upto([self.trigger], told.content)):
            text.attempt(self.trigger)
            count = 0
            while (yield from self._call(text, told, is_begun=not self.section and not count)):
                text.attempt()
                count += 1
                yield from text.space()
            if count and self.section and (yield from text.literal(self.section_end, may_be_cut=True)):
                text.commit()
            told.content(text.as_it_was())

    def _call(self, text: Incoming, told: Told, is_begun: bool) -> Steps[bool]:
        """Whether one was read; then it is committed to."""
        if not is_begun:
            yield from text.space()
            if not (yield from text.literal(self.begin)):
                return False
        yield from text.space()
        name = yield from text.run(_NAME)
        if self.counts:
            if not (yield from text.literal(":")) or not (yield from text.run(_NUMBER)):
                return False
            name = name.removeprefix("functions.")
        if self.id_marker and (yield from text.literal(self.id_marker)):
            yield from text.run(_NAME)
        for part in self.then.split():
            yield from text.space()
            if not (yield from text.literal(part)):
                return False
        if not name or (yield from text.space()) != "{":
            return False
        text.commit()
        told.begin_call(name)
        if (yield from text.value(told.arguments)):
            text.attempt()
            yield from self._end(text)
            told.content(text.as_it_was())
        return True

    def _end(self, text: Incoming) -> Steps[None]:
        for part in self.end.split():
            yield from text.space()
            if not (yield from text.literal(part, may_be_cut=True)):
                return
            text.attempt()
        text.commit()

    def holds_to(self, tool: Tool) -> bool:
        return True

    def plain(self, spelling: Spelling) -> str:
        return ANY

    def calls(self, tools: Sequence[Tool], most: int, spelling: Spelling, is_begun: bool = False) -> str:
        objects = one_of("call", [self._lark(it, spelling) for it in tools])
        begin, end, between = (spelling.text(it) for it in (self.begin, self.end, self.between))
        more = f"({between} {begin} call {end}){{0,{most - 1}}}" if most > 1 else ""
        if self.section:
            section, section_end = "" if is_begun else spelling.text(self.section), spelling.text(self.section_end)
            return f"calls: {section} {begin} call {end} {more} {section_end}\n{objects}"
        return f"calls: {'' if is_begun else begin} call {end} {more}\n{objects}"

    def _lark(self, tool: Tool, spelling: Spelling) -> str:
        name = f"{quoted(f'functions.{tool.name}:')} /[0-9]{{1,3}}/" if self.counts else quoted(tool.name)
        return f"{name} {spelling.text(self.then)} {json_of(arguments_of(tool))}"


_MARKER = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")

_FENCE, _SECTION = "\n```", "<\uff5ctool\u2581calls\u2581begin\uff5c>"
_SECTION_END = "<\uff5ctool\u2581calls\u2581end\uff5c>"
_CALL, _CALL_END = "<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581call\u2581end\uff5c>"
_SEP = "<\uff5ctool\u2581sep\uff5c>"
FORMATS = (
    NamedJson("deepseek_v3", f"{_CALL}function{_SEP}", f"{_FENCE}json\n", f"{_FENCE}{_CALL_END}", _SECTION,
              _SECTION_END, between="\n"),
    NamedJson("deepseek_v31", _CALL, _SEP, _CALL_END, _SECTION, _SECTION_END),
    NamedJson("kimi_k2", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
              "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", counts=True),
    NamedJson("mistral_args", "[TOOL_CALLS]", "[ARGS]", id_marker="[CALL_ID]"),
    NamedJson("functionary", "<function=", ">", "</function>"),
)  # fmt: skip
