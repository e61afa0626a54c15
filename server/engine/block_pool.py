"""KV blocks: who holds each, and which still remember a prefix."""

from collections import OrderedDict
from collections.abc import Iterable

Block = int
# blocks that are taken into use before cached ones give way: so many, or a sixteenth
_LEAST_WORTH, _WORTH_SHARE = 64, 16


class BlockPool:
    """Reference-counted KV blocks, with the content hash of those that are full.

    A block nobody holds is *free*, but keeps its hash until it is handed out again: a later request with the same
    prefix takes it back.

        held (refs > 0)  ->  free, still cached  ->  handed out again, hash forgotten
                         <-  touched by a prefix hit

    Handed out first are blocks without a hash, the one released last before the others: their memory is there already.
    A block that nobody has held yet costs memory, which the host has still to find. So beyond a part of the pool it is
    handed out only where a larger cache pays: cached blocks give way, least recently used first, but for each one that
    is asked for after it gave way, one more may be taken into use.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_with: dict[bytes, Block] = {}
        # free blocks are those of the next two, and all from `_num_ever_held` on
        self._blank: list[Block] = []  # the one released last is at the end
        # an ordered dict, not a deque: a prefix hit removes from the middle in O(1). Oldest first.
        self._cached: OrderedDict[Block, None] = OrderedDict()
        self._num_ever_held = 0
        self._num_worth_holding = min(num_blocks, max(_LEAST_WORTH, num_blocks // _WORTH_SHARE))
        self._given_up: OrderedDict[bytes, None] = OrderedDict()  # what gave way to spare memory; oldest first

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached) + self.num_blocks - self._num_ever_held

    def take(self, count: int) -> list[Block]:
        """Blocks for new content, each held once. The caller has checked `num_free`."""
        assert count <= self.num_free
        blocks = [self._take_one() for _ in range(count)]
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def _take_one(self) -> Block:
        if self._blank:
            return self._blank.pop()
        if self._num_ever_held < self._num_worth_holding or not self._cached:
            self._num_ever_held += 1
            return self._num_ever_held - 1
        block, _ = self._cached.popitem(last=False)
        content = self._hash_of[block]
        assert content is not None
        del self._block_with[content]
        self._hash_of[block] = None
        if self._num_ever_held < self.num_blocks:
            self._given_up[content] = None
            if len(self._given_up) > self.num_blocks:
                self._given_up.popitem(last=False)
        return block

    def find(self, content: bytes) -> Block | None:
        """The block, held or free, whose content has this hash."""
        return self._block_with.get(content)

    def missed(self, contents: Iterable[bytes]) -> None:
        """A prefix goes on with these, and they were not found."""
        for content in contents if self._given_up else ():
            if content in self._given_up:
                del self._given_up[content]
                self._num_worth_holding = min(self.num_blocks, self._num_worth_holding + 1)

    def touch(self, block: Block) -> None:
        """Hold a block once more: a prefix hit."""
        if self._refs[block] == 0:
            del self._cached[block]
        self._refs[block] += 1

    def remember(self, block: Block, content: bytes) -> None:
        """The block is full and has this content. The first block with a content keeps it; a twin stays anonymous."""
        assert self._refs[block] > 0 and self._hash_of[block] is None
        if content not in self._block_with:
            self._block_with[content] = block
            self._hash_of[block] = content
            self._given_up.pop(content, None)

    def release(self, block: Block) -> None:
        assert self._refs[block] > 0
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if self._hash_of[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def check(self, held: dict[Block, int]) -> None:
        """Recompute what is kept incrementally. `held` counts each block's appearances in block tables."""
        assert self._refs == [held.get(block, 0) for block in range(self.num_blocks)]
        free = {block for block, refs in enumerate(self._refs) if refs == 0}
        never_held = range(self._num_ever_held, self.num_blocks)
        assert sorted([*self._blank, *self._cached, *never_held]) == sorted(free)
        assert all(self._hash_of[block] is None for block in (*self._blank, *never_held))
        assert all(self._hash_of[block] is not None for block in self._cached)
        known = {content: block for block, content in enumerate(self._hash_of) if content is not None}
        assert known == self._block_with
        assert not self._given_up.keys() & known.keys() and len(self._given_up) <= self.num_blocks
        assert self._num_ever_held <= self.num_blocks and self._num_worth_holding <= self.num_blocks
