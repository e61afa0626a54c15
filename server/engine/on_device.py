"""Where the engine said that adapters are: the front's copy, told by each change and not asked for."""

from collections.abc import Callable, Iterator

from adapters_store.ref import AdapterRef
from server.engine.messages import AdapterMoved
from server.engine.request import Tier


class OnDevice:
    """The last word on each adapter that is somewhere else than in its files."""

    def __init__(self) -> None:
        self._places: dict[AdapterRef, AdapterMoved] = {}
        self._followers: list[Callable[[AdapterMoved], None]] = []

    def follow(self, follower: Callable[[AdapterMoved], None]) -> None:
        """It is told of every change from now on, when it can be seen here."""
        self._followers.append(follower)

    def take(self, moved: AdapterMoved) -> None:
        if moved.tier is Tier.ABSENT:
            self._places.pop(moved.ref, None)
        else:
            self._places[moved.ref] = moved
        for follower in self._followers:
            follower(moved)

    def forget(self, ref: AdapterRef) -> None:
        """The engine knows it no more."""
        self._places.pop(ref, None)

    def of(self, ref: AdapterRef) -> AdapterMoved:
        return self._places.get(ref) or AdapterMoved(ref, Tier.ABSENT)

    def __iter__(self) -> Iterator[AdapterMoved]:
        return iter(self._places.values())

    def __len__(self) -> int:
        return len(self._places)
