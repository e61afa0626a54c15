"""How the answers to one request are read, and what they may be: by a template's formats and the request's wishes."""

import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from server.api.texts.calls.format import CallFormat
from server.api.texts.calls.lark import ANY, Spelling
from server.api.texts.reasoning import Reasoning
from server.api.texts.rehearsal import ID_CHARS
from server.api.texts.speech import Splitter, Tool, ToolsWanted
from server.api.texts.splitting import PlainSplitter, TextSplitter

_LETTERS = string.ascii_letters + string.digits
MOST_CALLS = 64  # in one answer that a grammar holds to


@dataclass
class OneSpeaker:
    """`is_open`: the prompt ends in the midst of reasoning. `format`: of calls, if tools are wanted. Grammars of many
    tools are long, and made once."""

    spelling: Spelling
    reasoning: Reasoning | None
    is_open: bool
    format: CallFormat | None = None
    wanted: ToolsWanted | None = None
    one_at_a_time: bool = False  # the template takes no turn with several calls

    @cached_property
    def _tools(self) -> Mapping[str, Tool]:
        return {it.name: it for it in self.wanted.tools} if self.wanted else {}

    @property
    def kept_tokens(self) -> frozenset[int]:
        markers = [marker for it in (self.reasoning, self.format) if it is not None for marker in it.markers]
        return self.spelling.special_among(markers)

    @property
    def before(self) -> str:
        if self.reasoning is None:
            return ""
        return self.reasoning.lark(self.is_open, self.spelling)

    @property
    def opening(self) -> str:
        return "" if self.reasoning is None else self.reasoning.opening(self.spelling)

    @cached_property
    def calls(self) -> str:
        if self.format is None or self.wanted is None:
            return ""
        return f"start: calls\n{self._calls(self.format, self.wanted)}"

    @cached_property
    def answer(self) -> str | None:
        if self.format is None or self.wanted is None:
            return None
        if self.wanted.must_call:
            return self.calls
        if self.wanted.parallel and self.wanted.only is None and not any(it.is_strict for it in self.wanted.tools):
            return None
        return self._text_with_calls(self.format, self.wanted)

    def splitter(self) -> Splitter:
        if self.reasoning is None and self.format is None:
            return PlainSplitter()
        return TextSplitter(self.reasoning, self.format, self._tools, self.is_open)

    def new_call_id(self) -> str:
        return "".join(secrets.choice(_LETTERS) for _ in range(ID_CHARS))

    def _text_with_calls(self, format: CallFormat, wanted: ToolsWanted) -> str:
        trigger = format.trigger
        if not trigger:
            return f"start: {format.plain(self.spelling)} | calls\n{self._calls(format, wanted)}"
        if self.spelling.has_token(trigger):
            return f"start: {ANY} (calls {ANY})?\n{self._calls(format, wanted)}"
        until = self.spelling.until("until_calls", trigger)
        return f"start: {ANY} | until_calls calls\n{until}\n{self._calls(format, wanted, is_begun=True)}"

    def _calls(self, format: CallFormat, wanted: ToolsWanted, is_begun: bool = False) -> str:
        tools = [it for it in wanted.tools if wanted.only is None or it.name in wanted.only]
        if not wanted.must_call:  # what is not strict may be called anyhow
            tools = [it if it.is_strict else it._replace(parameters={"type": "object"}) for it in tools]
        most = MOST_CALLS if wanted.parallel and not self.one_at_a_time else 1
        return format.calls(tools, most, self.spelling, is_begun)
