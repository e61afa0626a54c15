"""Tokens to text, piece by piece, and the text of single tokens."""

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from server.token_bytes import TokenBytes

_MOST_TOLD = 65_536  # texts of single tokens that are kept
_MOST_HELD = 8  # tokens without text: more than a character has bytes


class Decoder:
    """Text of one answer, token by token; a character of several tokens comes out when it is whole.

    Bytes that are no UTF-8 come out as U+FFFD: at once where no character can come of them any more, else with `flush`.
    `kept_tokens`: special ones that come out although others are skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts: "TokenTexts",
        skip_special_tokens: bool = True,
        kept_tokens: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        self._skips, self._kept = skip_special_tokens, kept_tokens if skip_special_tokens else frozenset()
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._held: list[int] = []  # tokens since the last text

    def push(self, token: int) -> str:
        if token in self._kept:
            held = self.flush()
            self._begin_anew()
            return held + self._texts.of(token).text
        if self._skips and self._texts.is_special(token):
            return ""  # the stream would hold it, and decode all that it holds anew with each token
        text = self._stream.step(self._tokenizer, token)
        if text:
            self._held.clear()
            return text
        self._held.append(token)
        return self._broken() if len(self._held) >= _MOST_HELD else ""

    def flush(self) -> str:
        """No more tokens come: what is no whole character yet is none."""
        raw = b"".join(self._texts.of(token).bytes for token in self._held)
        self._held.clear()
        return raw.decode(errors="replace")

    def _broken(self) -> str:
        """Text of what is held, of which no character is longer than four bytes; but of what may still become one."""
        raw = [self._texts.of(token).bytes for token in self._held]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text, (open_bytes, _) = decoder.decode(b"".join(raw)), decoder.getstate()
        count = len(raw)
        while count and sum(map(len, raw[count:])) < len(open_bytes):
            count -= 1
        behind, self._held = self._held[count:], []
        self._begin_anew()
        return text + "".join(map(self.push, behind))

    def _begin_anew(self) -> None:
        """In the middle of a text."""
        self._stream = DecodeStream(ids=self._texts.before_any_word, skip_special_tokens=self._skips)


class StopStrings:
    """The stop strings of a request, prepared once for all its completions."""

    def __init__(self, stops: Sequence[str], keeps_stop: bool = False) -> None:
        """keeps_stop: an answer ends behind the one that ends it, and not before."""
        self.stops, self.keeps_stop = tuple(stops), keeps_stop
        self._borders = [_borders(stop) for stop in self.stops]

    def advance(self, index: int, matched: int, letter: str) -> int:
        """How many of the first letters of a stop string the text ends with, after one more letter: `matched` before.

        Knuth, Morris and Pratt's; what is tried again is bounded by the letters that came, however a stop repeats.
        """
        stop, borders = self.stops[index], self._borders[index]
        while matched and stop[matched] != letter:
            matched = borders[matched - 1]
        return matched + 1 if stop[matched] == letter else 0


def _borders(stop: str) -> list[int]:
    """For each beginning of `stop`: the longest proper beginning of it that it also ends with."""
    borders, matched = [0], 0
    for letter in stop[1:]:
        while matched and stop[matched] != letter:
            matched = borders[matched - 1]
        matched += stop[matched] == letter
        borders.append(matched)
    return borders


class StopMatcher:
    """Cuts text at the stop string that is complete first, however the text arrives in pieces."""

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._matched = [0] * len(stops.stops)  # letters of each stop string that the text ends with
        self._held = ""  # the end of the text, which may be the beginning of a stop
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is safe to send. Once one has `matched`, what follows the stop (and the stop) is gone."""
        if not self._matched:
            return text
        for place, letter in enumerate(text):
            self._matched = [self._stops.advance(i, it, letter) for i, it in enumerate(self._matched)]
            found = [stop for stop, it in zip(self._stops.stops, self._matched, strict=True) if it == len(stop)]
            if found:
                self.matched = max(found, key=len)
                self._held += text[: place + 1]
                cut = 0 if self._stops.keeps_stop else len(self.matched)
                return self._release(len(self._held) - cut)
        self._held += text
        return self._release(len(self._held) - max(self._matched))

    def flush(self) -> str:
        """No more text comes: what was held back is no stop."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        return released


class TokenText(NamedTuple):
    """A token by itself. One that is only a part of a character has no text: `text` is then its bytes, spelled out, as
    OpenAI has them (`bytes:\\xe2\\x82`)."""

    text: str
    bytes: bytes


class TokenTexts:
    """What single tokens stand for; looked up once each."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = TokenBytes(tokenizer)
        self._special = frozenset(token for token, it in tokenizer.get_added_tokens_decoder().items() if it.special)
        self._known: dict[int, TokenText] = {}

    @property
    def before_any_word(self) -> list[int]:
        """A token behind which others are decoded as in the middle of a text."""
        return self._bytes.before_any_word

    def is_special(self, token: int) -> bool:
        return token in self._special

    def of(self, token: int) -> TokenText:
        known = self._known.get(token)
        if known is None:
            raw = self._bytes.of(token)
            try:
                known = TokenText(raw.decode(), raw)
            except UnicodeDecodeError:
                known = TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)
            if len(self._known) >= _MOST_TOLD:
                self._known.clear()
            self._known[token] = known
        return known
