"""Pins: the adapters that running requests need on the device, and who waits for room there."""

from collections.abc import Iterable

from adapters_store.ref import AdapterRef
from server.engine.request import BASE_SLOT, Request, Slot
from server.engine.residency import AdapterFailed, Residency, Wait


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
    return str(AdapterFailed(name, failure.reason))


def starved(waiting: Iterable[Request], running: Iterable[Request], max_skips: int) -> Request | None:
    """The request that was passed over most often for want of adapter room, if that was too often."""
    starving = [request for request in waiting if request.num_skips > max_skips]
    if not starving:
        return None
    there = {adapter for request in running for adapter in request.adapters}
    lacking = [it for it in starving if not there.issuperset(it.adapters)]  # the others want a place
    return max(lacking, key=lambda request: request.num_skips, default=None)


def is_held_back(request: Request, starving: Request | None) -> bool:
    """While a request starves for adapter room, others may not pin adapters: their pins drain as requests end.

    Base requests need no room and go on.
    """
    return starving is not None and not set(request.adapters).issubset(starving.adapters)
