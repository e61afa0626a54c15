"""Room for adapters on the device: slots and pages, and who gives them up."""

import math
from collections.abc import Callable, Iterable, Sequence

from server.engine.request import Slot
from server.weights.idle import IdleAdapters
from server.weights.known import Known
from server.weights.page_pool import PagePool


class Room:
    """Makes it, of what is free first, then of what has been unused for longest: idle adapters, or KV blocks that
    nobody holds."""

    def __init__(self, num_slots: int, pool: PagePool, idle: IdleAdapters, evict: Callable[[Known], None]) -> None:
        self.num_slots = num_slots
        self._pool, self._idle, self._evict = pool, idle, evict
        self._free_slots = list(range(num_slots, 0, -1))  # popped from the end, the lowest first

    def make(self, pages: int) -> Slot | None:
        """A slot, with so many pages free. None if what is in the way is in use."""
        # nothing is given up in vain: first see whether all of it would do
        if not (self._free_slots or len(self._idle)) or pages > self._num_obtainable():
            return None
        while not self._free_slots or pages > self._num_free:
            if not self._give_up_next(pages):
                return None
        return self._free_slots.pop()

    def has_spare(self, pages: int) -> bool:
        """Whether there is room without anybody giving anything up."""
        return bool(self._free_slots) and pages <= self._num_free

    def give_back(self, slot: Slot) -> None:
        self._free_slots.append(slot)
        self._free_slots.sort(reverse=True)

    def in_the_way(self, num_slots: int, pages: int, busy: Iterable[Known]) -> Sequence[Known]:
        """Of those that are in use, so many as leave room for this when they are not; none if others do that, or if
        not even all of them would. What KV blocks have beyond their floor is no adapter's: it is claimed (`claim`)."""
        slots = num_slots - len(self._free_slots) - len(self._idle)
        pages -= self._num_below_cap + self._idle.num_pages
        chosen: list[Known] = []
        for it in sorted(busy, key=lambda it: it.pins):  # those with fewest users are soonest without any
            if slots <= 0 and pages <= 0:
                break
            chosen.append(it)
            slots, pages = slots - 1, pages - it.pages
        return chosen if slots <= 0 and pages <= 0 else []

    def claim(self, pages: int) -> None:
        """Somebody has waited for so many for too long: those that idle adapters do not leave, nobody else may take."""
        missing = min(pages - self._idle.num_pages, self._num_below_cap)
        self._pool.share.claimed = max(0, missing) * self._pool.page_bytes

    def refusal(self, pages: int) -> str | None:
        """Why there can never be room, if so."""
        return self.too_large(pages) if pages > self._pool.num_pages else None

    def kept(self, pages: int, pinned: Sequence[Known]) -> str | None:
        """Why there is none for as long as these are pinned, if so."""
        left = self._pool.num_pages - sum(it.pages for it in pinned)
        if pages <= left and len(pinned) < self.num_slots:
            return None
        needed, has = pages * self._pool.page_bytes, max(0, left) * self._pool.page_bytes
        return (
            f"it needs {needed:,} bytes and a slot; {len(pinned)} pinned adapters leave {has:,} bytes and "
            f"{self.num_slots - len(pinned)} slots"
        )

    def too_large(self, pages: int) -> str:
        needed, most, fixed = (
            count * self._pool.page_bytes for count in (pages, self._pool.num_pages, self._pool.num_withdrawn)
        )
        less = f" less {fixed:,} that expert places take, used or not" if fixed else ""
        return f"it needs {needed:,} bytes; all adapters together may use {most:,} (raise --adapter-bytes{less})"

    @property
    def _num_below_cap(self) -> int:
        """Pages that adapters may have and do not, if nobody else had them."""
        return self._pool.num_pages - self._pool.num_used

    @property
    def _num_free(self) -> int:
        return min(self._num_below_cap, self._pool.num_free)

    def _num_obtainable(self) -> int:
        """Pages, if everybody gives up what is not in use. What idle adapters leave is theirs to use again."""
        return min(self._num_below_cap, self._pool.num_within_reach) + self._idle.num_pages

    def _give_up_next(self, pages: int) -> bool:
        """Whether anything was given up. Others are asked only for what adapters may then have."""
        own, others = self._idle.next(), self._pool.share.others_unused_since()
        is_lacking = bool(self._free_slots) and self._pool.num_free < min(pages, self._num_below_cap)
        if is_lacking and others is not None:
            since = self._idle.unused_since()
            if since is None or others <= since:
                return self._pool.share.ask_others(math.inf)
        if own is None:
            return False
        self._evict(own)
        return True

    def check(self, held: Iterable[Slot]) -> None:
        slots = [*held, *self._free_slots]
        assert sorted(slots) == list(range(1, self.num_slots + 1))
