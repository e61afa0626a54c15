"""Which adapters the engine has been told of. It is told of one when it is first used, and not of all that exist."""

from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from adapters_store.ref import AdapterRef
from server.engine.messages import PackedAddAdapter, RemoveAdapter

MOST_KNOWN = 1024


class Packages(Protocol):
    """Where adapters are described."""

    def packed(self, ref: AdapterRef) -> PackedAddAdapter:
        """What the engine must know of the adapter. May read a local database; raises AdapterError if there is none."""


class Introductions:
    """At most `most_known` adapters at a time, beside those that are pinned or in use. The least recently used are
    removed: that is a tombstone to the engine, and a later use introduces them again."""

    def __init__(
        self,
        packages: Packages,
        send: Callable[[PackedAddAdapter | RemoveAdapter], None],
        is_used: Callable[[AdapterRef], bool],
        most_known: int = MOST_KNOWN,
    ) -> None:
        self._packages, self._send, self._is_used = packages, send, is_used
        self._most_known = most_known
        self._known: dict[AdapterRef, None] = {}  # least recently used first, those that are pinned left out
        self._pinned: set[AdapterRef] = set()

    def introduce(self, refs: Iterable[AdapterRef]) -> None:
        """These are about to be used. Raises AdapterError if one is not there any more; then nothing is used."""
        wanted = dict.fromkeys(refs)
        for ref in wanted:
            if ref in self._known:
                self._known[ref] = self._known.pop(ref)
            elif ref not in self._pinned:
                self._tell(ref)
        self._make_room(wanted)

    def again(self, ref: AdapterRef) -> None:
        """Tell of it, told before or not: something about it has changed. Raises AdapterError."""
        self._tell(ref)
        self._make_room([ref])

    def _tell(self, ref: AdapterRef) -> None:
        message = self._packages.packed(ref)
        self.forget(ref)
        if message.pinned:
            self._pinned.add(ref)
        else:
            self._known[ref] = None
        self._send(message)

    def forget(self, ref: AdapterRef) -> None:
        """The engine knows it no longer, or will not."""
        self._known.pop(ref, None)
        self._pinned.discard(ref)

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref in self._known or ref in self._pinned

    def __len__(self) -> int:
        return len(self._known) + len(self._pinned)

    def _make_room(self, wanted: Collection[AdapterRef]) -> None:
        while len(self) > self._most_known:
            idle = next((ref for ref in self._known if ref not in wanted and not self._is_used(ref)), None)
            if idle is None:
                return  # all are in use
            self.forget(idle)
            self._send(RemoveAdapter(idle))
