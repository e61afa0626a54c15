"""Text that comes in pieces, read as if it were there: a reader is a generator that waits where more must come.

Whatever the pieces are, a reader does the same: it decides only by what it has seen up to a place, and waits where that
is not enough. Each character is looked at a few times, however long the text is.
"""

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

Result = TypeVar("Result")
Steps = Generator[None, None, Result]
Tell = Callable[[str], None]

SPACE = re.compile(r"[ \t\r\n]*")
_NEWLINES = re.compile(r"\n*")
# in strings
_PLAIN = {it: re.compile(rf"(?:[^{it}\\]++|\\.)*+", re.DOTALL) for it in ('"', "'")}
_CONTROL = re.compile(r"[\x00-\x1f]")
_OUTSIDE = re.compile(r'[^"{}\[\]]*')  # of strings
_SCALAR = re.compile(r"[^,}\]\s]*")
_MOST_CHARS = 4096  # of a string that is read whole: a name, a key
_MOST_TEXT = 8 << 20  # of arguments that a model wrote as a string with JSON in it


class Incoming:
    """`add` text and let the reader go on; `end`, and no more comes.

    What is taken while `attempt` counts is kept, so that it can be had back `as_it_was`.
    """

    def __init__(self) -> None:
        self.has_ended = False
        self._text, self._at = "", 0
        self._kept: list[str] | None = None

    def add(self, text: str) -> None:
        self._text, self._at = self._text[self._at :] + text, 0

    def end(self) -> None:
        self.has_ended = True

    # -- what may turn out to be something else ---

    def attempt(self, taken: str = "") -> None:
        """From here on what is taken is kept, behind what was `taken` already."""
        self._kept = [taken]

    def commit(self) -> None:
        """It is what it seemed to be."""
        self._kept = None

    def as_it_was(self) -> str:
        """All that was taken since the attempt began, if it was not committed to."""
        kept, self._kept = self._kept, None
        return "".join(kept or ())

    # -- reading: each of these waits for what it needs ---

    def upto(self, markers: Sequence[str], tell: Tell, leaves: bool = False) -> Steps[str]:
        """Tells what comes before the first of the markers, and takes that, or leaves it; at the text's end it is
        empty. No marker may be inside another."""
        while True:
            found = [(place, it) for it in markers if (place := self._text.find(it, self._at)) >= 0]
            if found:
                place, marker = min(found)
                self._tell(place, tell)
                self._take(place if leaves else place + len(marker))
                return marker
            begun = 0 if self.has_ended else max(map(self._begun, markers), default=0)
            self._tell(len(self._text) - begun, tell)
            if not (yield from self.more()):
                return ""

    def peek(self) -> Steps[str]:
        """The next character; empty at the end."""
        while self._at >= len(self._text):
            if not (yield from self.more()):
                return ""
        return self._text[self._at]

    def literal(self, wanted: str, may_be_cut: bool = False) -> Steps[bool]:
        """Takes it if it comes next, and nothing else. may_be_cut: or if the text ends in the midst of it."""
        while len(self._text) - self._at < len(wanted):
            if not wanted.startswith(self._text[self._at :]):
                return False
            if not (yield from self.more()):
                self._take(len(self._text) if may_be_cut else self._at)
                return may_be_cut
        if not self._text.startswith(wanted, self._at):
            return False
        self._take(self._at + len(wanted))
        return True

    def ahead(self, markers: Sequence[str]) -> Steps[str]:
        """Which of the markers comes next; it is not taken."""
        while True:
            here = self._text[self._at : self._at + max(map(len, markers))]
            found = next((it for it in markers if here.startswith(it)), "")
            if found or not any(it.startswith(here) for it in markers) or not (yield from self.more()):
                return found

    def one(self) -> str:
        """The character that was seen."""
        return self._take(self._at + 1)

    def run(self, pattern: re.Pattern[str], tell: Tell | None = None, most: int = _MOST_CHARS) -> Steps[str]:
        """Characters as long as `pattern`, a class with a star, takes them: at most so many, or told as they come."""
        taken: list[str] = []
        left = most
        while True:
            end = self._end_of(pattern, None if tell else left)
            at_edge = end == len(self._text) and (tell is not None or end - self._at < left)
            text = self._take(end)
            left -= len(text)
            if tell is None:
                taken.append(text)
            elif text:
                tell(text)
            if not at_edge or not (yield from self.more()):
                return "".join(taken)

    def space(self) -> Steps[str]:
        """White space, and the character behind it, which is not taken."""
        yield from self.run(SPACE, _nobody)
        return (yield from self.peek())

    def newlines(self) -> Steps[None]:
        yield from self.run(_NEWLINES, _nobody)

    def string(self, most: int = _MOST_CHARS) -> Steps[str | None]:
        """A string as JSON has it; None: there is none, or a longer one."""
        raw: list[str] = []
        if not (yield from self.quoted(raw.append, most=most)):
            return None
        try:
            text: str = json.loads("".join(raw), strict=False)
            text.encode()
        except ValueError:  # half of a surrogate pair among them
            return None
        return text

    def quoted(self, tell: Tell, quote: str = '"', most: int | None = None) -> Steps[bool]:
        """A string with its quotes and escapes, told as it comes. Whether it was whole, and of at most so many."""
        if (yield from self.peek()) != quote:
            return False
        tell(self._take(self._at + 1))
        left = most
        while True:
            end = self._end_of(_PLAIN[quote], left)
            if end > self._at:
                left = None if left is None else left - (end - self._at)
                tell(self._take(end))
            char = yield from self.peek()
            if not char or left == 0:
                return False
            if char == "\\":  # what it escapes is to come
                tell(self._take(self._at + 1))
                if left == 1 or not (yield from self.peek()):
                    return False
                left = None if left is None else left - 2
            tell(self._take(self._at + 1))
            if char == quote:
                return True

    def value(self, tell: Tell) -> Steps[bool]:
        """One value of JSON, told as it comes. Whether it was whole; what is inside of its brackets is not judged, but
        control characters in strings, which JSON has not, are escaped."""
        first = yield from self.space()
        if first == '"':
            return (yield from self.quoted(_escaping(tell)))
        if first in ("{", "["):
            return (yield from self._brackets(tell))
        scalar = yield from self.run(_SCALAR)
        tell(scalar)
        return bool(scalar)

    def text_in_string(self) -> Steps[str | None]:
        return (yield from self.string(_MOST_TEXT))

    def rest(self) -> str:
        """All that is there already."""
        return self._take(len(self._text))

    def more(self) -> Steps[bool]:
        if self.has_ended:
            return False
        yield
        return True

    # -- below ---

    def _brackets(self, tell: Tell) -> Steps[bool]:
        depth, in_string = 0, _escaping(tell)
        while True:
            self._tell(self._end_of(_OUTSIDE), tell)
            char = yield from self.peek()
            if not char:
                return False
            if char == '"':
                if not (yield from self.quoted(in_string)):
                    return False
            elif char in "{}[]":
                tell(self._take(self._at + 1))
                depth += 1 if char in "{[" else -1
                if depth == 0:
                    return True

    def _end_of(self, pattern: re.Pattern[str], most: int | None = None) -> int:
        found = pattern.match(self._text, self._at, len(self._text) if most is None else self._at + most)
        return found.end() if found else self._at

    def _begun(self, marker: str) -> int:
        """Of how many characters at the text's end the marker may begin."""
        most = min(len(marker) - 1, len(self._text) - self._at)
        return next((it for it in range(most, 0, -1) if self._text.endswith(marker[:it])), 0)

    def _take(self, end: int) -> str:
        text, self._at = self._text[self._at : end], end
        if self._kept is not None:
            self._kept.append(text)
        return text

    def _tell(self, end: int, tell: Tell) -> None:
        if end > self._at:
            tell(self._take(end))


def _escaping(tell: Tell) -> Tell:
    return lambda text: tell(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _nobody(text: str) -> None:
    """Is told."""
