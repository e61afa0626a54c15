"""The requests that the front waits for, by number and by adapter."""

from collections import Counter
from collections.abc import Iterator
from typing import Generic, TypeVar

from adapters_store.ref import AdapterRef

Stream = TypeVar("Stream")


class OpenRequests(Generic[Stream]):
    def __init__(self) -> None:
        self._open: dict[int, tuple[Stream, AdapterRef | None]] = {}
        self._users: Counter[AdapterRef] = Counter()

    def add(self, request_id: int, stream: Stream, adapter: AdapterRef | None) -> None:
        self._open[request_id] = stream, adapter
        if adapter is not None:
            self._users[adapter] += 1

    def stream(self, request_id: int) -> Stream | None:
        """None: it is not open."""
        stream, _ = self._open.get(request_id, (None, None))
        return stream

    def end(self, request_id: int) -> bool:
        """Whether it was open."""
        if request_id not in self._open:
            return False
        _, adapter = self._open.pop(request_id)
        if adapter is not None:
            self._users[adapter] -= 1
            if not self._users[adapter]:
                del self._users[adapter]
        return True

    def num_of(self, adapter: AdapterRef) -> int:
        """Requests through these weights, whatever name they were asked for by."""
        return self._users[adapter]

    def adapters(self) -> list[AdapterRef]:
        """What they ask for, once by each name."""
        asked = (adapter for _, adapter in self._open.values() if adapter is not None)
        return list({(it.name, it.revision): it for it in asked}.values())

    def streams(self) -> list[Stream]:
        return list(dict.fromkeys(stream for stream, _ in self._open.values()))

    def __iter__(self) -> Iterator[int]:
        return iter(self._open)

    def __len__(self) -> int:
        return len(self._open)

    def check(self) -> None:
        """Recompute what is kept incrementally."""
        assert self._users == Counter(adapter for _, adapter in self._open.values() if adapter is not None)
