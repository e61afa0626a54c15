"""Which adapters are asked for most, of any number of them, at next to no cost for each request."""

import time
from collections.abc import Callable, Collection, Iterable
from heapq import nlargest

HALF_LIFE_S = 300.0  # in which a request comes to count half
RANK_EVERY_S = 30.0  # so often at most others come to be the most active: series that come and go cost Prometheus too
STAYING = 1.5  # as many times as others an adapter must be asked for to take the place of one that has series
MOST_KNOWN = 2048  # adapters of which it is known how often they are asked for; of more, those asked for least are not


class Activity:
    """Scores that grow: a request counts double for each half-life that has passed since the last ranking, so those
    that came before need no decay, and scores can be compared at any time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._scores: dict[str, float] = {}

    @property
    def is_due(self) -> bool:
        """Whether it is time to rank. That comes before the next count: else scores grow beyond what a number holds."""
        return self._clock() - self._since >= RANK_EVERY_S

    def count(self, name: str) -> None:
        """A request asks for it."""
        self._scores[name] = self._scores.get(name, 0.0) + 2.0 ** ((self._clock() - self._since) / HALF_LIFE_S)
        if len(self._scores) > MOST_KNOWN:
            self._scores = dict(nlargest(MOST_KNOWN // 2, self._scores.items(), key=lambda it: it[1]))

    def forget(self, name: str) -> None:
        self._scores.pop(name, None)

    def ranked(self, most: int, own: Collection[str], may: Callable[[str], bool]) -> list[str]:
        """The most active of those that `may` be. They are some others than `own` only where that is worth it."""
        self._rebase()

        def score(name: str) -> float:
            known = self._scores.get(name, 0.0)
            return known * STAYING if name in own else known

        candidates: Iterable[str] = dict.fromkeys((*own, *self._scores))
        return nlargest(most, filter(may, candidates), key=score)

    def _rebase(self) -> None:
        """Scores as of now. What has faded is forgotten."""
        by = 2.0 ** ((self._clock() - self._since) / -HALF_LIFE_S)
        self._since = self._clock()
        self._scores = {name: score * by for name, score in self._scores.items() if score * by > 0.01}

    def __len__(self) -> int:
        return len(self._scores)
