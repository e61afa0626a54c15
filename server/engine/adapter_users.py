"""Which adapters exist for the engine, and how many requests hold each."""

from collections import Counter
from collections.abc import Iterable, Mapping

from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from server.engine.messages import AdapterGone
from server.engine.request import Request
from server.engine.residency import Residency


class AdapterUsers:
    """A request holds its adapters' revisions from arrival to end, on the device or not.

    Removal is a tombstone: requests that hold the adapter finish on it, new ones are refused, and its room is given
    back when the last one ends. Registering the same revision again lifts the tombstone, and says
    where its files are now: then nothing has gone, and nothing is said of it.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._users: dict[AdapterRef, int] = {}
        self._removed: set[AdapterRef] = set()
        self._gone: list[AdapterGone] = []  # since it was asked last
        self._beside: Counter[AdapterRef] = Counter()  # those among the users that are not requests

    def register(self, ref: AdapterRef, package: AdapterPackage, pinned: bool = False) -> None:
        self._removed.discard(ref)
        self._users.setdefault(ref, 0)
        self._residency.register(ref, package, pinned)

    def remove(self, ref: AdapterRef) -> None:
        if ref not in self._users:
            self._gone.append(AdapterGone(ref, 0))  # whoever waits for it shall hear
        else:
            self._removed.add(ref)
            self._residency.unpin(ref)  # else it would keep its room from others while a request of its own waits
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

    def hold_revision(self, ref: AdapterRef) -> None:
        """For what is not a request, such as a check."""
        assert self.is_served(ref)
        self._users[ref] += 1
        self._beside[ref] += 1

    def let_go_revision(self, ref: AdapterRef) -> None:
        self._users[ref] -= 1
        self._beside[ref] -= 1
        self._forget_if_unused(ref)

    def _forget_if_unused(self, ref: AdapterRef) -> None:
        if ref in self._removed and self._users[ref] == 0:
            self._gone.append(AdapterGone(ref, self._residency.forget(ref)))
            self._removed.remove(ref)
            del self._users[ref]

    def take_gone(self) -> list[AdapterGone]:
        """Those that have gone since the last call."""
        gone, self._gone = self._gone, []
        return gone

    def check(self, requests: Iterable[Request]) -> None:
        counted = dict.fromkeys(self._users, 0) | +self._beside
        for request in requests:
            for ref in request.adapters:
                counted[ref] += 1
        assert counted == self._users
        assert all(self._users[ref] > 0 for ref in self._removed)

    def check_revisions(self, held: Mapping[AdapterRef, int]) -> None:
        """held: what others than requests hold."""
        assert +self._beside == held
