"""What became of grammars that were compiled lately, refusals too."""

import math
import time
from collections import OrderedDict

from server.grammars.jobs import Compiled, Refused


class Outcomes:
    """At most `most` of them, and at most `most_bytes` of their texts; the one that was asked for longest ago goes
    first."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[bytes, Compiled | Refused] = OrderedDict()
        self._until: dict[bytes, float] = {}  # of those that are not kept for good
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes) -> Compiled | Refused | None:
        if self._until.get(key, math.inf) < time.monotonic():
            self._drop(key)
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
        return kept

    def put(self, key: bytes, outcome: Compiled | Refused, until: float | None = None) -> None:
        """until: seconds of the monotonic clock; None: for good."""
        self._drop(key)
        size = _size(key, outcome)
        if size > self._most_bytes:
            return
        self._kept[key] = outcome
        if until is not None:
            self._until[key] = until
        self.num_bytes += size
        while len(self._kept) > self._most or self.num_bytes > self._most_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: bytes) -> None:
        self._until.pop(key, None)
        outcome = self._kept.pop(key, None)
        if outcome is not None:
            self.num_bytes -= _size(key, outcome)

    def check(self) -> None:
        """Recompute what is kept incrementally."""
        assert self.num_bytes == sum(_size(key, it) for key, it in self._kept.items()) <= self._most_bytes
        assert len(self._kept) <= self._most
        assert self._until.keys() <= self._kept.keys()


def _size(key: bytes, outcome: Compiled | Refused) -> int:
    text = outcome.grammar if isinstance(outcome, Compiled) else outcome.message
    return len(key) + 4 * len(text)  # as Python holds it at worst
