"""How often something took how long. An observation costs a search among the bounds and two additions."""

from bisect import bisect_left
from collections.abc import Sequence

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# between two tokens of one answer: closest where people begin to notice
INTER_TOKEN_SECONDS = (
    0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 10,
)  # fmt: skip


class Histogram:
    """`counts[i]` observations were at most `bounds[i]` and more than the bound before; the last has no bound."""

    __slots__ = ("_bounds", "counts", "sum", "told_bounds")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.told_bounds = _told(tuple(bounds))
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def add(self, other: "Histogram") -> None:
        """What was observed there too. It has the same bounds."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


def _told(bounds: tuple[float, ...]) -> tuple[str, ...]:
    return (*(repr(float(bound)) for bound in bounds), "+Inf")
