"""Adapters on the device that nobody uses: which goes first when room is wanted."""

from collections.abc import Callable
from itertools import islice

from adapters_store.ref import AdapterRef
from server.weights.known import Known

_LOOKED_AT = 16  # of those that were used longest ago: others are worth more by any weight
_MOST_WEIGHT = 4.0  # times that an age counts for being cheap or dear to bring back
_NEW_SHARE = 0.1  # of a load in what loads are known to take


class ReloadCosts:
    """What it takes to bring an adapter back, in seconds a byte: learned from loads, apart for those from the host
    cache and for those from disk."""

    def __init__(self) -> None:
        self._usual: dict[bool, float] = {}

    def learn(self, it: Known, num_bytes: int, seconds: float, from_host: bool) -> None:
        it.load_s[from_host] = seconds
        new, usual = seconds / max(1, num_bytes), self._usual.get(from_host)
        self._usual[from_host] = new if usual is None else usual + _NEW_SHARE * (new - usual)

    def weight(self, it: Known, num_bytes: int, from_host: bool) -> float:
        """How much faster than a usual one, from disk, it would be back; 1 where that is not known."""
        usual, own = self._usual.get(False), it.load_s.get(from_host)
        cost = own / max(1, num_bytes) if own is not None else self._usual.get(from_host)
        if not usual or not cost:
            return 1.0
        return max(1 / _MOST_WEIGHT, min(_MOST_WEIGHT, usual / cost))


class IdleAdapters:
    """In order of last use. As the budget sees them (budget.Idle)."""

    def __init__(self, page_bytes: int, weight: Callable[[Known], float], evict: Callable[[Known], None]) -> None:
        self.now = 0.0
        self._page_bytes, self._weight, self._evict = page_bytes, weight, evict
        self._adapters: dict[AdapterRef, Known] = {}  # the one that was used longest ago first
        self._num_pages = 0

    def add(self, it: Known) -> None:
        assert it.is_idle and it.ref not in self._adapters
        self._adapters[it.ref] = it
        self._num_pages += it.pages

    def discard(self, it: Known) -> None:
        """Before its pages go."""
        if self._adapters.pop(it.ref, None) is not None:
            self._num_pages -= it.pages

    @property
    def num_pages(self) -> int:
        return self._num_pages

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, it: Known) -> bool:
        return it.ref in self._adapters

    def next(self) -> Known | None:
        """The one whose age counts for most."""
        return min(islice(self._adapters.values(), _LOOKED_AT), key=self._counts_as_unused_since, default=None)

    def _counts_as_unused_since(self, it: Known) -> float:
        return self.now - (self.now - it.unused_since) * self._weight(it)

    # -- budget.Idle -----------------------------------------------------------

    def num_bytes(self) -> int:
        return self._num_pages * self._page_bytes

    def unused_since(self) -> float | None:
        it = self.next()
        return None if it is None else self._counts_as_unused_since(it)

    def give_up(self) -> None:
        it = self.next()
        assert it is not None
        self._evict(it)

    def check(self, known: dict[AdapterRef, Known]) -> None:
        assert self._adapters.keys() == {ref for ref, it in known.items() if it.is_idle}
        assert self._num_pages == sum(it.pages for it in self._adapters.values())
