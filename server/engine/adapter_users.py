"""Which adapters exist for the engine, and how many requests hold each."""

from collections.abc import Iterable

from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from server.engine.request import Request
from server.engine.residency import Residency


class AdapterUsers:
    """A request holds its adapters' revisions from arrival to end, on the device or not.

    Removal is a tombstone: requests that hold the adapter finish on it, new ones are refused, and its room is given
    back when the last one ends. Registering the same revision again lifts the tombstone, and says
    where its files are now.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._users: dict[AdapterRef, int] = {}
        self._removed: set[AdapterRef] = set()

    def register(self, ref: AdapterRef, package: AdapterPackage) -> None:
        self._removed.discard(ref)
        self._users.setdefault(ref, 0)
        self._residency.register(ref, package)

    def remove(self, ref: AdapterRef) -> None:
        if ref in self._users:
            self._removed.add(ref)
            self._forget_if_unused(ref)

    def is_served(self, ref: AdapterRef) -> bool:
        return ref in self._users and ref not in self._removed

    def hold(self, request: Request) -> None:
        for ref in request.adapters:
            assert self.is_served(ref)
            self._users[ref] += 1

    def let_go(self, request: Request) -> None:
        for ref in request.adapters:
            self._users[ref] -= 1
        for ref in set(request.adapters):
            self._forget_if_unused(ref)

    def _forget_if_unused(self, ref: AdapterRef) -> None:
        if ref in self._removed and self._users[ref] == 0:
            self._residency.forget(ref)
            self._removed.remove(ref)
            del self._users[ref]

    def check(self, requests: Iterable[Request]) -> None:
        counted = dict.fromkeys(self._users, 0)
        for request in requests:
            for ref in request.adapters:
                counted[ref] += 1
        assert counted == self._users
        assert all(self._users[ref] > 0 for ref in self._removed)
