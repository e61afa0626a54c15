"""rank_pattern and alpha_pattern: the value of the first pattern that matches the end of a name, as PEFT's
get_pattern_key finds it: `(.*\\.)?(pattern)$`, from the name's beginning.

Most patterns are names, there may be as many as modules, and each module asks. So a pattern of letters, digits and dots
is no search: dots match any one character, hence it matches what is as long as it, and equal between its dots. Names
are looked up by these pieces, once for all patterns with dots in the same places.
"""

import re
from collections.abc import Iterator
from typing import Generic, NamedTuple, TypeVar

import regex

from adapters_store.errors import InvalidAdapter

Number = TypeVar("Number", int, float)
_SECONDS = 0.1  # a pattern is the sender's regular expression, and this is one match; the whole has its budget
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


class _Form(NamedTuple):
    """Where the pieces between the dots of a pattern lie, counted from its end."""

    length: int
    pieces: tuple[tuple[int, int], ...]

    def of(self, name: str) -> tuple[str, ...] | None:
        """The pieces of the end of `name`; None if it is too short, or does not begin after a dot."""
        begin = len(name) - self.length
        if begin < 0 or (begin > 0 and name[begin - 1] != "."):
            return None
        return tuple(name[begin + start : begin + end] for start, end in self.pieces)


class Patterns(Generic[Number]):
    """`key` is what the configuration calls them. Raises InvalidAdapter for what is no regular expression."""

    def __init__(self, key: str, patterns: dict[str, Number], default: Number, file: str) -> None:
        self._key, self._file = key, file
        self._default: Number = default
        self._values: list[Number] = list(patterns.values())
        self._names: dict[_Form, dict[tuple[str, ...], int]] = {}  # -> the number of the first such pattern
        self._searched: list[tuple[int, regex.Pattern[str]]] = []
        for number, pattern in enumerate(patterns):
            if _NAME.fullmatch(pattern):
                form = _form(pattern)
                self._names.setdefault(form, {}).setdefault(tuple(re.findall(r"[^.]+", pattern)), number)
            else:
                self._searched.append((number, self._compiled(number, pattern)))

    def find(self, name: str) -> Number:
        """Raises InvalidAdapter where a match takes too long."""
        first = min(self._named(name), default=len(self._values))
        for number, pattern in self._searched:
            if number > first:
                break
            try:
                if pattern.match(name, timeout=_SECONDS):
                    return self._values[number]
            except TimeoutError:
                raise self._refusal(number) from None
        return self._values[first] if first < len(self._values) else self._default

    def _named(self, name: str) -> Iterator[int]:
        """Numbers of patterns that match and are no search."""
        for form, found in self._names.items():
            pieces = form.of(name)
            if pieces is not None and pieces in found:
                yield found[pieces]

    def _compiled(self, number: int, pattern: str) -> regex.Pattern[str]:
        try:
            return regex.compile(rf"(.*\.)?({pattern})$", cache_pattern=False)
        except regex.error:
            raise self._refusal(number) from None

    def _refusal(self, number: int) -> InvalidAdapter:
        return InvalidAdapter(
            f"pattern number {number + 1} of {self._key} in {self._file} cannot be used: it is no regular expression, "
            f"or a match takes more than {_SECONDS} s; write the module's name instead"
        )


def _form(pattern: str) -> _Form:
    pieces = [match.span() for match in re.finditer(r"[^.]+", pattern)]
    return _Form(len(pattern), tuple(pieces))
