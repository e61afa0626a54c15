"""Harmony, in which an answer is messages in channels: reasoning in one, calls in another, and the content."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.api.texts.calls.lark import ANY, Spelling, arguments_of, json_of, one_of, quoted
from server.api.texts.incoming import Incoming, Steps, Tell
from server.api.texts.speech import Tool
from server.api.texts.told import Told

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
ANALYSIS = f"{_CHANNEL}analysis{_MESSAGE}"
_OF_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")


@dataclass(frozen=True)
class Harmony:
    """<|channel|>analysis<|message|>reasoning<|end|> and so on; a header says to whom a call goes."""

    name: str = "harmony"
    trigger: str = ""

    @property
    def markers(self) -> Sequence[str]:
        return (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS)

    def read(
        self, text: Incoming, told: Told, tools: Mapping[str, Tool], with_calls: bool = True, is_open: bool = False
    ) -> Steps[None]:
        if is_open:
            yield from self._reasoning(text, told)
        while (yield from text.peek()):
            yield from self._message(text, told, with_calls)

    def _message(self, text: Incoming, told: Told, with_calls: bool) -> Steps[None]:
        text.attempt()
        yield from text.space()
        if not (yield from text.ahead([_START, _CHANNEL, "to="])):  # no header
            told.content(text.as_it_was())
            yield from self._body(text, told.content)
            return
        header: list[str] = []
        if not (yield from text.upto([_MESSAGE], header.append)):
            told.content(text.as_it_was())
            return
        text.commit()
        channel, recipient = _OF_CHANNEL.search("".join(header)), _RECIPIENT.search("".join(header))
        if recipient and with_calls:
            told.begin_call(recipient[1])
            yield from text.value(told.arguments)
            if (yield from self._body(text, _nobody)):
                told.end_call()
        elif channel and channel[1] == "analysis":
            yield from self._reasoning(text, told)
        else:
            yield from self._body(text, told.content)

    def _reasoning(self, text: Incoming, told: Told) -> Steps[None]:
        told.is_reasoning = True
        if (yield from self._body(text, told.reasoning)):
            told.is_reasoning = False

    @staticmethod
    def _body(text: Incoming, tell: Tell) -> Steps[bool]:
        """Whether it ended."""
        if (yield from text.upto([*_ENDS, _START, _CHANNEL], tell, leaves=True)):
            for end in _ENDS:
                yield from text.literal(end)
            return True
        return False

    def holds_to(self, tool: Tool) -> bool:
        return True

    def plain(self, spelling: Spelling) -> str:
        return f"{self.content(spelling)} {ANY}"

    def content(self, spelling: Spelling) -> str:
        """What it begins with."""
        return spelling.text(f"{_CHANNEL}final{_MESSAGE}")

    def reasoning(self, spelling: Spelling, is_open: bool) -> str:
        """What may come before an answer, with what begins the next message; or if it is open the rest, which must."""
        rest = f"%lark {{\nstart: reasoning\n{spelling.until('reasoning', '<|end|>')}\n}}"
        rest = f"{rest} {spelling.text(f'{_START}assistant')}"
        return rest if is_open else f"({spelling.text(ANALYSIS)} {rest})?"

    def calls(self, tools: Sequence[Tool], most: int, spelling: Spelling, is_begun: bool = False) -> str:
        """One: the token that ends a call ends the answer."""
        head, rest = spelling.text(f"{_CHANNEL}commentary to=functions."), spelling.text(f" {_CONSTRAIN}json{_MESSAGE}")
        calls = [f"{head} {quoted(it.name)} {rest} {json_of(arguments_of(it))}" for it in tools]
        return f"calls: call\n{one_of('call', calls)}"


def _nobody(text: str) -> None:
    """Is told."""


HARMONY = Harmony()
