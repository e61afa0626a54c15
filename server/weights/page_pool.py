"""The adapters' share of memory, in pages."""

from server.weights.budget import MemoryBudget, Share


class PagePool:
    """Counts the physical pages that arenas have mapped for adapters, and says whether more may be.

    Torch-free and unaware of addresses. Pages of the base model are not counted: they never move.
    """

    def __init__(self, share: Share, page_bytes: int) -> None:
        self.page_bytes, self.share = page_bytes, share
        self.num_withdrawn = 0
        self._used = 0

    @property
    def num_pages(self) -> int:
        """The most that adapters may have."""
        return self.share.cap // self.page_bytes - self.num_withdrawn

    @property
    def num_used(self) -> int:
        return self._used

    @property
    def num_free(self) -> int:
        return self.share.free // self.page_bytes

    @property
    def num_within_reach(self) -> int:
        """Free ones, and those that others would give up."""
        return self.share.within_reach // self.page_bytes

    def take(self, count: int) -> None:
        """The caller has checked `num_free`."""
        self.share.take(count * self.page_bytes)
        self._used += count

    def give_back(self, count: int) -> None:
        assert 0 <= count <= self._used
        self.share.give_back(count * self.page_bytes)
        self._used -= count

    def withdraw(self, count: int) -> None:
        """Make the share smaller for good, for what has taken its pages before any adapter came (padded_arena.py)."""
        self.share.take(count * self.page_bytes)
        self.num_withdrawn += count

    def check(self) -> None:
        assert self.share.used == (self._used + self.num_withdrawn) * self.page_bytes


def own_pool(num_bytes: int, page_bytes: int) -> PagePool:
    """Of a share that nobody contends for."""
    return PagePool(MemoryBudget(num_bytes).open("adapters", 0, num_bytes), page_bytes)
