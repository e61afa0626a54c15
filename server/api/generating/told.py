"""Log-probabilities as they are worded: entry by entry, each encoded once, and others have their turn in between.

There may be hundreds of thousands in one answer, which at one go would hold everybody up.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec

from server.api.generating.choice import TokenTold
from server.api.texts.decoding import TokenTexts

_AT_ONCE = 500  # entries
Entry = TypeVar("Entry")


async def worded(entries: Iterable[Entry], word: Callable[[Entry], bytes]) -> list[bytes]:
    told: list[bytes] = []
    for entry in entries:
        told.append(word(entry))
        if len(told) % _AT_ONCE == 0:
            await asyncio.sleep(0)
    return told


def joined(entries: Iterable[bytes]) -> msgspec.Raw:
    """A JSON array."""
    return msgspec.Raw(b"[" + b",".join(entries) + b"]")


class ChatWords:
    """As chat words tokens, and responses too."""

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts

    def entries(self, tokens: Sequence[TokenTold]) -> list[TokenTold]:
        """What ended the answer has no text in it, and is left out."""
        return [it for it in tokens if not it.ends]

    def word(self, it: TokenTold) -> bytes:
        told, top = it.logprobs, zip(it.logprobs.ids, it.logprobs.top, strict=True)
        return msgspec.json.encode(
            {**self._entry(it.id, told.chosen), "top_logprobs": [self._entry(*other) for other in top]}
        )

    def at_once(self, tokens: Sequence[TokenTold]) -> msgspec.Raw:
        """Of a few."""
        return joined(map(self.word, self.entries(tokens)))

    async def all(self, tokens: Sequence[TokenTold]) -> msgspec.Raw:
        return joined(await worded(self.entries(tokens), self.word))

    def _entry(self, token: int, logprob: float) -> dict[str, object]:
        it = self._texts.of(token)
        return {"token": it.text, "logprob": logprob, "bytes": list(it.bytes)}
