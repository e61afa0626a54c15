"""Pins: the adapters that running requests need on the device, and who waits for room there."""

from collections.abc import Iterable
from itertools import islice

from adapters_store.ref import AdapterRef
from server.engine.lines import Line
from server.engine.queue import WaitingQueue
from server.engine.request import BASE_SLOT, Request, Slot
from server.engine.residency import AdapterFailed, Residency, Wait

_AT_ONCE = 3  # of so many adapters in use one may be made to drain at a time, so that the rest goes on
_MOST_LOOKED_AT = 256  # lines in a step
_MOST_ASKED = 32  # lines in a step that may find that their adapters are not there, before only those that are count


class Pins:
    """As of one step: what is found absent stays so within it. A thousand requests may want the same adapter."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._absent: dict[AdapterRef, Wait] = {}

    def pin(self, request: Request) -> list[Slot] | Wait:
        """The adapter slot of each lane, all of them pinned; or why it must wait, and none is. Raises AdapterFailed."""
        slots: list[Slot] = []
        pinned: list[AdapterRef] = []
        for adapter in (lane.adapter for lane in request.lanes):
            if adapter is None:
                slots.append(BASE_SLOT)
                continue
            try:
                slot = self._absent.get(adapter) or self._residency.acquire(adapter)
            except AdapterFailed:
                unpin(self._residency, pinned)
                raise
            if isinstance(slot, Wait):
                self._absent[adapter] = slot
                unpin(self._residency, pinned)
                return slot
            slots.append(slot)
            pinned.append(adapter)
        return slots


def unpin(residency: Residency, adapters: Iterable[AdapterRef]) -> None:
    for adapter in adapters:
        residency.release(adapter)


def worded(failure: AdapterFailed, request: Request) -> str:
    """What a request that needs the adapter is told: under its own name for it, since weights may have several."""
    name = next(ref for ref in request.adapters if ref == failure.ref)
    return str(AdapterFailed(name, failure.reason, failure.fault))


class Starvation:
    """Lines of which nothing has started in more than `max_skips` steps, for want of adapter room, and what is done for
    them.

    They are let in in the order in which they were served last, one at a time, or one for every three adapters in use.
    For their sake nobody else brings an adapter in, and those adapters that are in their way drain: none of their
    requests starts any more. Everybody else goes on: there is no step in which the whole batch drains.

    So the wait of one is bounded: by `max_skips` steps, and for each line that was unserved for longer by the longest
    answer of an adapter in the way and one transfer.
    """

    def __init__(self, residency: Residency, max_skips: int) -> None:
        self._residency, self._max_skips = residency, max_skips
        self._draining: set[AdapterRef] = set()
        self.first: list[Line] = []  # those that are to be let in now
        self._wanted: set[AdapterRef] = set()  # by them
        self._num_lacking = 0  # lines that were found to lack adapters in this step
        self._has_claimed = False

    def look(self, waiting: WaitingQueue, running: Iterable[Request]) -> None:
        """What holds in this step."""
        before, self.first = self.first, []
        self._wanted, way = set(), set[AdapterRef]()
        self._num_lacking = 0
        unserved = list(islice(waiting.unserved(self._max_skips), _MOST_LOOKED_AT))
        used = {ref for request in running for ref in request.adapters} if unserved else set[AdapterRef]()
        for line in unserved:
            if not (self._must_load(line) or line in before):  # those have their adapters now, and shall keep them
                continue  # it wants a place
            wanted = self._wanted.union(line.adapters)
            more = set(self._residency.in_the_way(wanted))
            if self.first and not 0 < len(more) <= len(used) // _AT_ONCE:
                break
            self.first.append(line)
            self._wanted, way = wanted, more
        if not any(line in before for line in self.first):
            self._draining.clear()
        # those that drain already go on with it, whatever residency says in this step: so they come to their end. And
        # those that have drained are not used again before the line has started: all in its way must be idle together
        others = sorted(way - self._draining, key=lambda ref: ref.revision)
        self._draining.update(others[: max(0, len(way) - len(self._draining & used))])
        if self._wanted or self._has_claimed:
            self._residency.claim(self._wanted)
            self._has_claimed = bool(self._wanted)

    def holds_back(self, line: Line) -> bool:
        """Whether the line must wait for the sake of those that starve, or need not be asked for in this step, in which
        so many others found no room. Base requests need none and go on."""
        if not line.adapters:
            return False
        if not self._wanted or self._wanted.issuperset(line.adapters):
            return self._num_lacking >= _MOST_ASKED and self._must_load(line)
        return not self._draining.isdisjoint(line.adapters) or self._must_load(line)

    def lacks(self, line: Line) -> None:
        """Where a request waits that needs several adapters, nobody else brings any in in this step: else two such
        requests evict each other's before all of one are there."""
        self._num_lacking += 1
        if not self._wanted and len(set(line.adapters)) > 1:
            self._wanted = set(line.adapters)

    def _must_load(self, line: Line) -> bool:
        return not all(map(self._residency.is_resident, line.adapters))
