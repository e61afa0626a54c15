"""One budget of pages for all adapters."""


class PagePool:
    """Counts the physical pages that arenas have mapped for adapters, and says whether more may be.

    Torch-free and unaware of addresses. Pages of the base model are not counted: they never move.
    """

    def __init__(self, budget_bytes: int, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.num_pages = budget_bytes // page_bytes
        self.num_withdrawn = 0
        self._used = 0

    @property
    def num_used(self) -> int:
        return self._used

    @property
    def num_free(self) -> int:
        return self.num_pages - self._used

    def take(self, count: int) -> None:
        """The caller has checked `num_free`."""
        assert 0 <= count <= self.num_free
        self._used += count

    def give_back(self, count: int) -> None:
        assert 0 <= count <= self._used
        self._used -= count

    def withdraw(self, count: int) -> None:
        """Make the budget smaller for good, for what has taken its pages before any adapter came (padded_arena.py)."""
        assert 0 <= count <= self.num_free
        self.num_pages -= count
        self.num_withdrawn += count
