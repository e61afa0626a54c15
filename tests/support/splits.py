"""What a splitter makes of an answer, put together again."""

from collections.abc import Sequence
from typing import NamedTuple

from server.api.texts.speech import Splitter


class Whole(NamedTuple):
    content: str
    reasoning: str
    calls: list[tuple[str | None, str]]


def split(splitter: Splitter, pieces: Sequence[str]) -> Whole:
    said = [splitter.push(it) for it in pieces] + [splitter.flush()]
    calls: list[tuple[str | None, str]] = []
    for piece in (piece for it in said for piece in it.calls):
        if piece.name is not None:
            assert piece.index == len(calls)
            calls.append((piece.name, ""))
        assert piece.index == len(calls) - 1
        calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    assert splitter.num_calls == len(calls)
    return Whole("".join(it.content for it in said), "".join(it.reasoning for it in said), calls)
