"""What a model says beside plain text: reasoning, and calls of tools.

A template has its own markers for both. Whoever reads its answers needs to know them: text comes in pieces, and each
piece is content, reasoning, or a part of a call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class Tool(NamedTuple):
    """A function that the model may call. `parameters`: the JSON Schema of its arguments. `is_strict`: arguments that
    do not follow it must not come."""

    name: str
    description: str | None
    parameters: Mapping[str, Any]
    is_strict: bool = False


@dataclass(frozen=True)
class ToolsWanted:
    """`must_call`: an answer is one or more calls, and no text. `only`: the names that may be called; None: all.
    `parallel`: more than one call may come."""

    tools: Sequence[Tool]
    must_call: bool = False
    only: frozenset[str] | None = None
    parallel: bool = True


class Formats(NamedTuple):
    """Of calls and reasoning, by name, for templates that do not show them. None: as the template shows; "none", of
    reasoning: it is content like the rest."""

    calls: str | None = None
    reasoning: str | None = None


AS_SHOWN = Formats()


@dataclass(frozen=True)
class CallPiece:
    """Some of a call: `index` counts the answer's calls from 0, `name` comes once, with the first piece of a call, and
    `arguments` are a piece of JSON text, an object when it is whole."""

    index: int
    name: str | None
    arguments: str


class Said(NamedTuple):
    """What a piece of text turned out to be."""

    content: str = ""
    reasoning: str = ""
    calls: Sequence[CallPiece] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)


class Splitter(Protocol):
    """Tells what the text of one answer is, as it comes."""

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as is known."""

    @property
    def num_calls(self) -> int:
        """Calls that have begun so far."""

    def push(self, text: str) -> Said:
        """What is certain of the text so far, and was not told before."""

    def flush(self) -> Said:
        """No more text comes."""


class Speaker(Protocol):
    """How the answers to one request are read, and what they may be."""

    @property
    def kept_tokens(self) -> frozenset[int]:
        """Special tokens that mark something, and that the splitter must see."""

    @property
    def before(self) -> str:
        """What may come before the content, in Lark (GrammarSource.before); empty if nothing does."""

    @property
    def opening(self) -> str:
        """What content begins with behind that, and calls do not (GrammarSource.opening)."""

    @property
    def answer(self) -> str | None:
        """The grammar of answers that must call, or that may be text with calls of strict tools in it, in Lark; None:
        any text may come."""

    @property
    def calls(self) -> str:
        """The grammar of calls and nothing else, in Lark; empty where none may come."""

    def splitter(self) -> Splitter:
        """One for each completion."""

    def new_call_id(self) -> str:
        """As the template takes them."""
