"""KV blocks: who holds each, and which still remember a prefix."""

import math
from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from heapq import heappop, heappush

from server.engine.block_memory import BlockMemory, Extent, OwnMemory

Block = int
# blocks that are taken into use before cached ones give way: so many, or a sixteenth
_LEAST_WORTH, _WORTH_SHARE = 64, 16


class BlockPool:
    """Reference-counted KV blocks, with the content hash of those that are full.

    A block nobody holds is *free*, but keeps its hash until it is handed out again: a later request with the same
    prefix takes it back.

        held (refs > 0)  ->  free, still cached  ->  handed out again, hash forgotten
                         <-  touched by a prefix hit

    Blocks have memory an extent at a time (block_memory.py). Handed out first are blocks without a hash whose memory is
    there, of the lowest extent, so that the others come to be idle. Memory that is not there yet costs others
    something. So beyond a part of the pool it is taken only where a larger cache pays: cached blocks give way, least
    recently used first, but for each one that is asked for after it gave way, one more may be taken into use.

    Extents of which no block is held may be given up to others (`give_up`), with what is cached there. While somebody
    claims memory, no block is handed out beyond as many extents as are left to the pool then: so those come to be idle
    as their requests end.
    """

    def __init__(self, num_blocks: int, memory: BlockMemory | None = None) -> None:
        """num_blocks: the most that there can be. memory None: all of it is there for nobody else."""
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.now = 0.0  # seconds of the clock that steps are told of
        self._memory = memory or OwnMemory()
        self._size = self._memory.extent_blocks
        assert num_blocks % self._size == 0
        self._refs = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_with: dict[bytes, Block] = {}
        # free blocks whose memory is there are those of the next two
        self._blank: dict[Extent, list[Block]] = {}  # without a hash, by extent; the one released last is at the end
        self._num_blank = 0
        self._lowest: list[Extent] = []  # a heap of extents that have blank blocks, and of some that no longer do
        # an ordered dict, not a deque: a prefix hit removes from the middle in O(1). Oldest first; when it was released
        self._cached: OrderedDict[Block, float] = OrderedDict()
        self._cached_in: Counter[Extent] = Counter()
        self._num_held = 0
        self._absent = list(range(num_blocks // self._size - 1, -1, -1))  # extents; the lowest is at the end
        self._held_in: dict[Extent, int] = {}  # blocks that are held, of the extents that are there
        self._idle: dict[Extent, float] = {}  # those of which none is held, and since when; the first was so first
        self._forgetful: dict[Extent, None] = {}  # those of the idle ones that remember nothing
        self._num_worth_holding = min(num_blocks, max(_LEAST_WORTH, num_blocks // _WORTH_SHARE))
        self._given_up: OrderedDict[bytes, None] = OrderedDict()  # what gave way to spare memory; oldest first

    @property
    def num_held(self) -> int:
        return self._num_held

    @property
    def num_free(self) -> int:
        """Blocks that `make_ready` could make ready."""
        more = min(self._memory.num_obtainable(), len(self._absent))
        return self._num_ready + more * self._size

    @property
    def num_within_reach(self) -> int:
        """Blocks that there are, or could be if others gave up what they do not use."""
        return min(self.num_blocks, self._num_held + self.num_free)

    @property
    def _num_ready(self) -> int:
        """Free blocks that may be handed out: all of them, unless somebody claims memory."""
        ready, beyond = self._num_blank + len(self._cached), self._beyond()
        return ready - sum(self._size - self._held_in[extent] for extent in beyond)

    def _beyond(self) -> list[Extent]:
        """Extents that are there, and more than are left to the pool: the highest ones."""
        count = len(self._held_in) - self._memory.num_left()
        return sorted(self._held_in)[-count:] if count > 0 else []

    def make_ready(self, count: int) -> bool:
        """See to it that so many can be taken. False if they cannot."""
        while self._num_ready < count:
            if not self._extend(math.inf):
                return False
        return True

    def take(self, count: int) -> list[Block]:
        """Blocks for new content, each held once. The caller has made them ready."""
        has_them = self.make_ready(count)
        assert has_them
        blocks: list[Block] = []
        barred = frozenset(self._beyond())
        for _ in range(count):
            block = self._take_one(barred)
            self._hold(block)
            blocks.append(block)
        return blocks

    def _take_one(self, barred: Collection[Extent]) -> Block:
        block = self._take_blank(barred)
        if block is None and len(self._held_in) * self._size < self._num_worth_holding:
            # a cached block is worth as much as what others have not used for longer
            self._extend(next(iter(self._cached.values()), math.inf))
            block = self._take_blank(barred)
        if block is None:
            block = next(it for it in self._cached if not barred or it // self._size not in barred)
            self._uncache(block)
            self._forget(block, is_spared=bool(self._absent))
        return block

    def _take_blank(self, barred: Collection[Extent]) -> Block | None:
        """Of the lowest extent that has any."""
        while self._lowest:
            extent = self._lowest[0]
            blocks = self._blank.get(extent)
            if not blocks:
                heappop(self._lowest)
                continue
            if extent in barred:  # all that follow are higher
                return None
            self._num_blank -= 1
            return blocks.pop()
        return None

    def _add_blank(self, blocks: Sequence[Block]) -> None:
        """All of one extent."""
        extent = blocks[0] // self._size
        own = self._blank.setdefault(extent, [])
        if not own:
            heappush(self._lowest, extent)
        own += blocks
        self._num_blank += len(blocks)

    def _extend(self, unused_since: float) -> bool:
        """One more extent, if it can be had."""
        if not self._absent or not self._memory.take(self._absent[-1], unused_since):
            return False
        extent = self._absent.pop()
        self._held_in[extent] = 0
        self._idle[extent] = self.now
        self._forgetful[extent] = None
        self._add_blank(list(reversed(self._blocks_of(extent))))
        return True

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
            self._uncache(block)
            self._hold(block)
        else:
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
        if self._refs[block]:
            return
        if self._hash_of[block] is None:
            self._add_blank([block])
        else:
            self._cached[block] = self.now
            self._cached_in[block // self._size] += 1
        self._let_go(block)

    # -- memory that others may have -----------------------------------------------------------

    @property
    def num_idle_extents(self) -> int:
        """Those of which no block is held."""
        return len(self._idle)

    def idle_since(self) -> float | None:
        """When the idle extent that was used longest ago was used. -inf: one remembers nothing. None: none is idle."""
        return -math.inf if self._forgetful else next(iter(self._idle.values()), None)

    def give_up(self) -> None:
        """Give back the idle extent that was used longest ago: the highest of those that remember nothing, if any."""
        extent = max(self._forgetful) if self._forgetful else next(iter(self._idle))
        for block in self._blocks_of(extent) if self._cached_in[extent] else ():
            if block in self._cached:
                self._uncache(block)
                self._forget(block, is_spared=True)
        self._num_blank -= len(self._blank.pop(extent, ()))
        del self._held_in[extent], self._idle[extent]
        self._forgetful.pop(extent, None)
        insort(self._absent, extent, key=lambda it: -it)
        self._memory.give_back(extent)

    def _blocks_of(self, extent: Extent) -> range:
        return range(extent * self._size, (extent + 1) * self._size)

    def _hold(self, block: Block) -> None:
        self._refs[block] = 1
        self._num_held += 1
        extent = block // self._size
        self._held_in[extent] += 1
        if self._held_in[extent] == 1:
            del self._idle[extent]
            self._forgetful.pop(extent, None)

    def _let_go(self, block: Block) -> None:
        self._num_held -= 1
        extent = block // self._size
        self._held_in[extent] -= 1
        if self._held_in[extent] == 0:
            self._idle[extent] = self.now
            if not self._cached_in[extent]:
                self._forgetful[extent] = None

    def _uncache(self, block: Block) -> None:
        del self._cached[block]
        self._cached_in[block // self._size] -= 1

    def _forget(self, block: Block, is_spared: bool) -> None:
        """What it remembers. `is_spared`: it could go on remembering if there was more memory."""
        content = self._hash_of[block]
        assert content is not None
        del self._block_with[content]
        self._hash_of[block] = None
        if is_spared:
            self._given_up[content] = None
            if len(self._given_up) > self.num_blocks:
                self._given_up.popitem(last=False)

    def check(self, held: dict[Block, int]) -> None:
        """Recompute what is kept incrementally. `held` counts each block's appearances in block tables."""
        assert self._refs == [held.get(block, 0) for block in range(self.num_blocks)]
        there = {block for extent in self._held_in for block in self._blocks_of(extent)}
        assert sorted([*self._held_in, *self._absent]) == list(range(self.num_blocks // self._size))
        assert self._absent == sorted(self._absent, reverse=True)
        blank = [block for blocks in self._blank.values() for block in blocks]
        assert len(blank) == self._num_blank
        assert sorted([*blank, *self._cached]) == sorted(block for block in there if not self._refs[block])
        assert all(block // self._size == extent for extent, blocks in self._blank.items() for block in blocks)
        assert all(extent in self._lowest for extent, blocks in self._blank.items() if blocks)
        assert all(block in there for block in held)
        assert all(self._hash_of[block] is None for block in blank)
        assert all(self._hash_of[block] is not None for block in self._cached)
        assert +self._cached_in == Counter(block // self._size for block in self._cached)
        known = {content: block for block, content in enumerate(self._hash_of) if content is not None}
        assert known == self._block_with
        assert not self._given_up.keys() & known.keys() and len(self._given_up) <= self.num_blocks
        assert self._num_worth_holding <= self.num_blocks
        counted = Counter(block // self._size for block, refs in enumerate(self._refs) if refs)
        assert self._held_in == {extent: counted[extent] for extent in self._held_in}
        assert self._idle.keys() == {extent for extent, count in self._held_in.items() if not count}
        assert self._forgetful.keys() == {extent for extent in self._idle if not self._cached_in[extent]}
        assert self._num_held == sum(counted.values())
        self._memory.check(self._held_in)
