"""What a format's reader makes of a directory, before a byte of weights is read, and what it finds on the way."""

from collections import Counter

import msgspec

from adapters_store.parts import Part
from adapters_store.ref import Kind
from adapters_store.safetensors_file import Weights


class Reading(msgspec.Struct, frozen=True):
    """`meaning` is what the configuration adds to the weights, their scales and the order of their numbers: it is part
    of the revision, whereas the adapter's name and place are not. `notes` are the package's. `idle` are keys of
    tensors that no part has: they must be zero."""

    kind: Kind
    weights: tuple[Weights, ...]
    parts: tuple[Part, ...]
    meaning: str = ""
    declared_base: str | None = None
    notes: tuple[str, ...] = ()
    idle: frozenset[str] = frozenset()


class Findings:
    """What does not fit, a line each, with what to do about it; and what was understood from something other than the
    plain form, counted. There may be as many lines as tensors, of which a message shows a few."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.remedies: list[str] = []
        self._notes: Counter[str] = Counter()

    def refuse(self, problem: str, remedy: str) -> None:
        self.problems.append(problem)
        if remedy not in self.remedies:
            self.remedies.append(remedy)

    def note(self, sentence: str, count: int = 1) -> None:
        """`sentence` goes on after the count."""
        self._notes[sentence] += count

    @property
    def notes(self) -> list[str]:
        return [f"{count:,} {sentence}" for sentence, count in self._notes.items()]
