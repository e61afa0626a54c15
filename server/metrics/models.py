"""Numbers by model, of any number of adapters in a bounded number of series.

The base and the most active adapters have series of their own; all others are summed as `other`. When an adapter loses
its own they are added to that sum, so what is summed over models never goes down; when it has them again they begin at
0, which Prometheus takes for a restart.
"""

import time
from collections.abc import Callable, Iterator

from adapters_store.catalog import Catalog
from server.metrics.activity import Activity
from server.metrics.counts import Counts

OTHER = "other"  # so an adapter of that name is counted among them


class Model:
    """Whoever counts for a model holds this, and adds to `counts` as it is at that moment: it is another object from
    the moment on when the model is summed with others."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts = Counts()


class Models:
    def __init__(self, catalog: Catalog, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`most`: adapters that may have series of their own at a time."""
        self._catalog, self._most = catalog, most
        self._activity = Activity(clock)
        self._own: dict[str, Model] = {}  # adapters
        self._base = Model()
        self._other = self._base if catalog.base_name == OTHER else Model()
        self._has_others = False  # something was counted there

    def asked_for(self, name: str) -> Model:
        """A request asks for it."""
        if name != self._catalog.base_name:
            if self._activity.is_due:
                self._rank()
            self._activity.count(name)
        return self.of(name)

    def of(self, name: str) -> Model:
        if name == self._catalog.base_name:
            return self._base
        own = self._own.get(name)
        if own is not None:
            return own
        if len(self._own) < self._most and self._may_have_own(name):
            return self._own.setdefault(name, Model())
        self._has_others = True
        return self._other

    def has_own(self, name: str) -> bool:
        return name in self._own

    def forget(self, name: str) -> None:
        """The adapter is deleted: its place is another's."""
        self._activity.forget(name)
        self._sum_with_others(name)

    def adapters(self) -> Iterator[tuple[str, Counts]]:
        """In the order in which they got their series."""
        yield from ((name, it.counts) for name, it in self._own.items())
        if self._has_others:
            yield OTHER, self._other.counts

    def all(self) -> Iterator[tuple[str, Counts]]:
        yield self._catalog.base_name, self._base.counts
        yield from ((name, it) for name, it in self.adapters() if it is not self._base.counts)

    def _may_have_own(self, name: str) -> bool:
        """One that is deleted may still be counted for: for its last requests, say."""
        return name != OTHER and name in self._catalog

    def _rank(self) -> None:
        ranked = dict.fromkeys(self._activity.ranked(self._most, self._own.keys(), self._may_have_own))
        for name in [name for name in self._own if name not in ranked]:
            self._sum_with_others(name)
        for name in ranked:
            self._own.setdefault(name, Model())

    def _sum_with_others(self, name: str) -> None:
        own = self._own.pop(name, None)
        if own is not None:
            self._has_others = True
            self._other.counts.add(own.counts)
            own.counts = self._other.counts
