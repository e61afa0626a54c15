"""KV blocks: who holds each, and which still remember a prefix."""

from collections import OrderedDict

Block = int


class BlockPool:
    """Reference-counted KV blocks, with the content hash of those that are full.

    A block nobody holds is *free*, but keeps its hash until it is handed out again: a later request with the same
    prefix takes it back. Free blocks are handed out least recently used first.

        held (refs > 0)  ->  free, still cached  ->  handed out again, hash forgotten
                         <-  touched by a prefix hit
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_with: dict[bytes, Block] = {}
        # an ordered dict, not a deque: a prefix hit removes from the middle in O(1). Oldest first.
        self._free: OrderedDict[Block, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[Block]:
        """Blocks for new content, each held once. The caller has checked `num_free`."""
        assert count <= self.num_free
        return [self._take_oldest() for _ in range(count)]

    def _take_oldest(self) -> Block:
        block, _ = self._free.popitem(last=False)
        stale = self._hash_of[block]
        if stale is not None:
            del self._block_with[stale]
            self._hash_of[block] = None
        self._refs[block] = 1
        return block

    def find(self, content: bytes) -> Block | None:
        """The block, held or free, whose content has this hash."""
        return self._block_with.get(content)

    def touch(self, block: Block) -> None:
        """Hold a block once more: a prefix hit."""
        if self._refs[block] == 0:
            del self._free[block]
        self._refs[block] += 1

    def remember(self, block: Block, content: bytes) -> None:
        """The block is full and has this content. The first block with a content keeps it; a twin stays anonymous."""
        assert self._refs[block] > 0 and self._hash_of[block] is None
        if content not in self._block_with:
            self._block_with[content] = block
            self._hash_of[block] = content

    def release(self, block: Block) -> None:
        assert self._refs[block] > 0
        self._refs[block] -= 1
        if self._refs[block] == 0:
            self._free[block] = None

    def check(self, held: dict[Block, int]) -> None:
        """Recompute what is kept incrementally. `held` counts each block's appearances in block tables."""
        assert self._refs == [held.get(block, 0) for block in range(self.num_blocks)]
        assert set(self._free) == {block for block, refs in enumerate(self._refs) if refs == 0}
        known = {content: block for block, content in enumerate(self._hash_of) if content is not None}
        assert known == self._block_with
