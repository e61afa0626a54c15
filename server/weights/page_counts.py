"""Which pages a set of byte ranges occupies."""

from collections import Counter


class PageCounts:
    """Counts the pages under ranges that come and go. Torch-free.

    Ranges do not overlap, so only the first and the last page of one can be another's too. Those are counted by their
    users; the pages between are only summed, so a gigabyte costs no more bookkeeping than a kilobyte.
    """

    def __init__(self, num_bytes: int, page_bytes: int) -> None:
        self._num_bytes, self._page_bytes = num_bytes, page_bytes
        self._edges: Counter[int] = Counter()
        self._num_inner = 0

    @property
    def num_pages(self) -> int:
        return self._num_inner + len(self._edges)

    def added_by(self, offset: int, size: int) -> range:
        """The pages that this range would add."""
        return self._sole(self._pages(offset, size), users=0)

    def add(self, offset: int, size: int) -> range:
        """Returns the pages added: one run, since only its ends can be shared."""
        pages = self._pages(offset, size)
        added = self._sole(pages, users=0)
        for edge in {pages[0], pages[-1]}:  # Counter.update would take longer than all else
            self._edges[edge] += 1
        self._num_inner += max(0, len(pages) - 2)
        return added

    def remove(self, offset: int, size: int) -> range:
        """Undo one add of exactly this range; returns the pages that nobody uses any more."""
        pages = self._pages(offset, size)
        gone = self._sole(pages, users=1)
        for edge in {pages[0], pages[-1]}:
            self._edges[edge] -= 1
            if not self._edges[edge]:
                del self._edges[edge]
        self._num_inner -= max(0, len(pages) - 2)
        return gone

    def check(self, ranges: list[tuple[int, int]]) -> None:
        """Recompute the counts from the ranges that were added."""
        pages = [self._pages(offset, size) for offset, size in ranges]
        assert self._edges == Counter(edge for it in pages for edge in {it[0], it[-1]})
        assert self._num_inner == sum(max(0, len(it) - 2) for it in pages)

    def _pages(self, offset: int, size: int) -> range:
        assert size > 0 and 0 <= offset and offset + size <= self._num_bytes
        return range(offset // self._page_bytes, -(-(offset + size) // self._page_bytes))

    def _sole(self, pages: range, users: int) -> range:
        """`pages` without an edge that has more users than these."""
        start = pages.start + (self._edges[pages[0]] > users)
        stop = pages.stop - (self._edges[pages[-1]] > users)
        return range(start, max(start, stop))
