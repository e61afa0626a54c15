"""What the engine and the process that makes masks tell each other: frames of messages, each behind its length."""

from collections.abc import Iterator
from typing import Generic, TypeVar

import msgspec

from server.grammars.vocabulary_spec import VocabularySpec

_PREFIX = 4  # bytes of a length
Message = TypeVar("Message")


class Begin(msgspec.Struct, frozen=True, tag=True):
    """The first message. A row has `row_bytes`, of which the model's tokens take as much as they need."""

    vocabulary: VocabularySpec
    num_rows: int
    row_bytes: int


class Open(msgspec.Struct, frozen=True, tag=True):
    """Masks of this grammar go into `row` from now on. No other has had this `ticket`. `tokens`: that came already."""

    ticket: int
    row: int
    grammar: str
    tokens: list[int]


class Accept(msgspec.Struct, frozen=True, tag=True):
    ticket: int
    token: int


class Close(msgspec.Struct, frozen=True, tag=True):
    ticket: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The vocabulary is loaded."""


class Masked(msgspec.Struct, frozen=True, tag=True):
    """The mask is in the ticket's row. `seconds`: what it took to accept the last token and to make it."""

    ticket: int
    seconds: float


class Broke(msgspec.Struct, frozen=True, tag=True):
    """No more masks come for the ticket, and nothing is written to its row any more."""

    ticket: int
    reason: str
    is_its_own: bool


class Closed(msgspec.Struct, frozen=True, tag=True):
    """Nothing is written to the ticket's row any more."""

    ticket: int


class Unfit(msgspec.Struct, frozen=True, tag=True):
    """There will be no masks at all: the vocabulary cannot be loaded."""

    reason: str


ToMasks = Begin | Open | Accept | Close
FromMasks = Ready | Masked | Broke | Closed | Unfit


def framed(messages: list[Message]) -> bytes:
    encoded = msgspec.msgpack.encode(messages)
    return len(encoded).to_bytes(_PREFIX, "little") + encoded


class Frames(Generic[Message]):
    """Puts together what arrives in pieces."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[list[Message]]) -> None:
        self._decoder, self._held = decoder, bytearray()

    def push(self, data: bytes) -> Iterator[Message]:
        self._held += data
        place = 0
        while len(self._held) - place >= _PREFIX:
            end = place + _PREFIX + int.from_bytes(self._held[place : place + _PREFIX], "little")
            if len(self._held) < end:
                break
            yield from self._decoder.decode(memoryview(self._held)[place + _PREFIX : end])
            place = end
        if place:
            self._held = self._held[place:]
