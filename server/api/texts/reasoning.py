"""Where templates keep a model's reasoning apart from what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from server.api.texts.calls.harmony import ANALYSIS, HARMONY
from server.api.texts.calls.lark import Spelling
from server.api.texts.incoming import Incoming, Steps
from server.api.texts.told import Told

_NEWLINES = r"/\n{1,4}/"


class Reasoning(Protocol):
    @property
    def name(self) -> str:
        """What manifests and command lines call it."""

    @property
    def markers(self) -> Sequence[str]:
        """What a tokenizer may have tokens for."""

    def is_written_by(self, template: str) -> bool:
        """Whether a template's source has its markers: to write an earlier turn's, or to leave it out."""

    def is_open_behind(self, prompt: str) -> bool:
        """Whether a prompt ends in the midst of it."""

    def is_open_in(self, turn: str) -> bool:
        """Whether it goes on behind what the model has said of its turn."""

    def read(self, text: Incoming, told: Told, is_open: bool, content: Steps[None]) -> Steps[None]:
        """An answer: reasoning, and then `content` reads on. is_open: the prompt ends in the midst of reasoning."""

    def lark(self, is_open: bool, spelling: Spelling) -> str:
        """An expression for what may come before the content, or before calls; if it is open, for the rest that
        must."""

    def opening(self, spelling: Spelling) -> str:
        """An expression for what the content begins with; empty: with itself."""


@dataclass(frozen=True)
class TaggedReasoning:
    """An answer may begin with reasoning between two markers. Newlines within them and behind them belong to them."""

    name: str
    begin: str
    end: str

    @property
    def markers(self) -> Sequence[str]:
        return (self.begin, self.end)

    def read(self, text: Incoming, told: Told, is_open: bool, content: Steps[None]) -> Steps[None]:
        yield from self._reasoning(text, told, is_open)
        yield from content

    def _reasoning(self, text: Incoming, told: Told, is_open: bool) -> Steps[None]:
        if not is_open:
            text.attempt()
            yield from text.space()
            if not (yield from text.literal(self.begin)):
                told.content(text.as_it_was())
                return
            text.commit()
        told.is_reasoning = True
        yield from text.newlines()
        trimmed = _Trimmed(told)
        if (yield from text.upto([self.end], trimmed.tell)):
            told.is_reasoning = False
            yield from text.newlines()

    def is_written_by(self, template: str) -> bool:
        return self.begin in template and self.end in template

    def is_open_behind(self, prompt: str) -> bool:
        return prompt.rstrip().endswith(self.begin)

    def is_open_in(self, turn: str) -> bool:
        return turn.lstrip().startswith(self.begin) and self.end not in turn

    def opening(self, spelling: Spelling) -> str:
        return ""

    def lark(self, is_open: bool, spelling: Spelling) -> str:
        rest = f"%lark {{\nstart: reasoning\n{spelling.until('reasoning', self.end)}\n}} {_NEWLINES}?"
        return rest if is_open else f"({spelling.text(self.begin)} {rest})?"


class HarmonyReasoning:
    """In a channel of its own; so is the content."""

    name = HARMONY.name
    markers = HARMONY.markers

    def is_written_by(self, template: str) -> bool:
        return "<|channel|>" in template and "analysis" in template

    def is_open_behind(self, prompt: str) -> bool:
        return prompt.endswith(ANALYSIS)

    def is_open_in(self, turn: str) -> bool:
        return False

    def read(self, text: Incoming, told: Told, is_open: bool, content: Steps[None]) -> Steps[None]:
        yield from HARMONY.read(text, told, {}, told.with_calls, is_open)

    def lark(self, is_open: bool, spelling: Spelling) -> str:
        return HARMONY.reasoning(spelling, is_open)

    def opening(self, spelling: Spelling) -> str:
        return HARMONY.content(spelling)


class _Trimmed:
    """Reasoning without the newlines at its end."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._newlines: list[str] = []

    def tell(self, text: str) -> None:
        stripped = text.rstrip("\n")
        if stripped:
            for it in self._newlines:
                self._told.reasoning(it)
            self._newlines.clear()
            self._told.reasoning(stripped)
        if len(stripped) < len(text):
            self._newlines.append(text[len(stripped) :])


_ALL: Sequence[Reasoning] = (
    HarmonyReasoning(),
    TaggedReasoning("think", "<think>", "</think>"),
    TaggedReasoning("mistral", "[THINK]", "[/THINK]"),
    TaggedReasoning("seed", "<seed:think>", "</seed:think>"),
    TaggedReasoning("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
)
REASONING_FORMATS: Mapping[str, Reasoning] = {it.name: it for it in _ALL}


def reasoning_of(template: str) -> Reasoning | None:
    """The format that a template's source knows of."""
    return next((it for it in _ALL if it.is_written_by(template)), None)
