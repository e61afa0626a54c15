"""An answer as a list of parts: reasoning, text, calls of tools. Routes that answer in parts have their own words for
them; how they come, one behind the other, is the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from server.api.generating.choice import Piece, TokenTold
from server.api.texts.speech import CallPiece, Said


class Kind(Enum):
    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


@dataclass(eq=False)
class Part:
    """`index`: its place in the answer. `text`: all of it so far; of a call its arguments, as JSON. `name` and
    `call_id`: of a call. `is_cut`: no more tokens were allowed, and it might have gone on."""

    kind: Kind
    index: int
    text: str = ""
    name: str = ""
    call_id: str = ""
    is_cut: bool = False


class Stage(Enum):
    BEGINS = "begins"
    GROWS = "grows"
    ENDS = "ends"


class Step(NamedTuple):
    """Of one part. `text` and `tokens`: what it grows by; tokens of texts only, where they were asked about."""

    part: Part
    stage: Stage
    text: str = ""
    tokens: Sequence[TokenTold] = ()


class Parts:
    """A part begins when there is something of it, and ends where another begins: one at a time is open. An answer that
    says nothing is an empty text."""

    def __init__(self, new_call_id: Callable[[], str]) -> None:
        self.all: list[Part] = []
        self._new_call_id = new_call_id
        self._calls: dict[int, Part] = {}  # by number
        self._open: Part | None = None
        self._tokens: list[TokenTold] = []  # whose text was not told yet
        self.finish: str | None = None
        self.stop: str | int | None = None

    def take(self, piece: Piece) -> Iterator[Step]:
        """The steps that it makes; of the last piece, also those to the end."""
        if not piece.num_reasoning or piece.said.content:
            self._tokens += piece.tokens
        yield from self._grow(piece.said)
        if piece.finish is not None:
            self.finish, self.stop = piece.finish, piece.stop
            yield from self._end(is_cut=piece.finish == "length")

    def _grow(self, said: Said) -> Iterator[Step]:
        """What belongs to the call that is open comes first."""
        rest = [it for it in said.calls if it.index in self._calls]
        for it in rest:
            yield from self._call_grows(it)
        if said.reasoning:
            yield from self._says(Kind.REASONING, said.reasoning)
        if said.content:
            yield from self._says(Kind.TEXT, said.content)
        for it in said.calls[len(rest) :]:
            yield from self._call_grows(it)

    def _says(self, kind: Kind, text: str) -> Iterator[Step]:
        part = self._open
        if part is None or part.kind is not kind:
            if part is not None and part.kind is Kind.CALL:
                text = text.removeprefix("\n")  # which only keeps it from the text before the call
            part = Part(kind, len(self.all))
            yield from self._begin(part)
        yield self._more(part, text)

    def _call_grows(self, it: CallPiece) -> Iterator[Step]:
        part = self._calls.get(it.index)
        if part is None:
            part = self._calls[it.index] = Part(
                Kind.CALL, len(self.all), name=it.name or "", call_id=self._new_call_id()
            )
            yield from self._begin(part)
        if it.arguments:
            yield self._more(part, it.arguments)

    def _begin(self, part: Part) -> Iterator[Step]:
        if self._open is not None:
            yield Step(self._open, Stage.ENDS)
        self._open = part
        self.all.append(part)
        yield Step(part, Stage.BEGINS)

    def _more(self, part: Part, text: str) -> Step:
        part.text += text
        tokens, self._tokens = self._tokens, []
        return Step(part, Stage.GROWS, text, tokens if part.kind is Kind.TEXT else ())

    def _end(self, is_cut: bool) -> Iterator[Step]:
        part = self._open
        if part is None:
            part = Part(Kind.TEXT, 0)
            yield from self._begin(part)
        if self._tokens and part.kind is Kind.TEXT:
            yield self._more(part, "")
        part.is_cut = is_cut
        yield Step(part, Stage.ENDS)
