"""Matchers of grammars that were opened lately, to be copied for each request. Imported in the masks' process only."""

import threading
from collections import OrderedDict

from llguidance import LLMatcher


class Prototypes:
    """At most `most` of them, and at most `most_bytes` of their grammars' text; the one that was asked for longest ago
    goes first. Threads share it."""

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._num_bytes = 0
        self._lock = threading.Lock()

    def get(self, grammar: str) -> LLMatcher | None:
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None:
                self._kept.move_to_end(grammar)
            return kept

    def put(self, grammar: str, matcher: LLMatcher) -> None:
        with self._lock:
            self._drop(grammar)
            if len(grammar) > self._most_bytes:
                return
            self._kept[grammar] = matcher
            self._num_bytes += len(grammar)
            while len(self._kept) > self._most or self._num_bytes > self._most_bytes:
                self._drop(next(iter(self._kept)))

    def drop(self, grammar: str) -> None:
        with self._lock:
            self._drop(grammar)

    def _drop(self, grammar: str) -> None:
        if self._kept.pop(grammar, None) is not None:
            self._num_bytes -= len(grammar)

    def check(self) -> None:
        """Recompute what is kept incrementally."""
        assert self._num_bytes == sum(map(len, self._kept)) <= self._most_bytes
        assert len(self._kept) <= self._most
