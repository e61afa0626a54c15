"""Who uses which adapter: from the moment a request has found what its model means until its last token.

What a lease holds stays: a name may come to mean other weights meanwhile, or nothing, and the request ends on those
that it began with."""

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Self

from adapters_store.ref import AdapterRef
from server.errors import HeddleError, InvalidRequest, TooManyOfAdapter


class Lease:
    def __init__(self, leases: "Leases", ref: AdapterRef | None, num_sequences: int) -> None:
        self.ref, self.num_sequences = ref, num_sequences
        self._leases = leases
        self._error: HeddleError | None = None
        self._on_end: Callable[[HeddleError], None] | None = None

    def bind(self, end: Callable[[HeddleError], None]) -> None:
        """How to end what the lease is for. Raises the error with which it was to end already."""
        if self._error is not None:
            raise self._error
        self._on_end = end

    def end_with(self, error: HeddleError) -> None:
        """What it is bound to runs no more, whether or not its client has read what came before; if it is bound to
        nothing yet, it ends when it would be."""
        self._error = error
        if self._on_end is not None:
            self._on_end(error)
            self.end()

    def end(self) -> None:
        """Safe at any time, any number of times."""
        if self.num_sequences:
            self._leases.give_back(self)
            self.num_sequences = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """What it was bound to ends it."""
        if self._on_end is None:
            self.end()


class Leases:
    """By name and by revision. The base's cost nothing and are not counted."""

    def __init__(self) -> None:
        self._by_name: dict[str, set[Lease]] = defaultdict(set)
        self._by_revision: dict[str, set[Lease]] = defaultdict(set)
        self._freed = asyncio.Event()

    def take(self, ref: AdapterRef | None, num_sequences: int, most: int | None = None) -> Lease:
        """`most`: sequences of this name that may be under way. Raises TooManyOfAdapter."""
        lease = Lease(self, ref, num_sequences)
        if ref is None:
            return lease
        if most is not None and num_sequences > most:
            raise InvalidRequest(f"{num_sequences} completions in one request; {ref.name!r} allows {most} at once")
        if most is not None and (under_way := self.num_sequences(ref.name)) + num_sequences > most:
            raise TooManyOfAdapter(
                f"{under_way} completions of {ref.name!r} are under way and {num_sequences} more were asked for; its "
                f"manifest allows {most} at once"
            )
        self._by_name[ref.name].add(lease)
        self._by_revision[ref.revision].add(lease)
        return lease

    def give_back(self, lease: Lease) -> None:
        if lease.ref is None:
            return
        for leases, key in ((self._by_name, lease.ref.name), (self._by_revision, lease.ref.revision)):
            leases[key].discard(lease)
            if not leases[key]:
                del leases[key]
        self._freed.set()

    def num_sequences(self, name: str) -> int:
        return sum(lease.num_sequences for lease in self._by_name.get(name, ()))

    def is_used(self, revision: str) -> bool:
        return revision in self._by_revision

    def held(self, name: str, revisions: Iterable[str]) -> set[Lease]:
        """What holds the name, or any of the revisions under whatever name, at this moment."""
        held = [self._by_name.get(name, ()), *(self._by_revision.get(it, ()) for it in revisions)]
        return {lease for leases in held for lease in leases}

    async def until_ended(self, held: Iterable[Lease], within_s: float = math.inf) -> bool:
        """Wait until all of these have ended; others may begin meanwhile. False if the time was up."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while any(lease.num_sequences for lease in held):
            left = deadline - loop.time()
            if left <= 0:
                return False
            self._freed.clear()
            try:
                await asyncio.wait_for(self._freed.wait(), None if math.isinf(left) else left)
            except TimeoutError:
                return False
        return True
