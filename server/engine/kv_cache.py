"""The KV cache as bookkeeping: block tables of lanes, and reuse of prefixes between them."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

from adapters_store.ref import AdapterRef
from server.engine.block_memory import BlockMemory
from server.engine.block_pool import Block, BlockPool
from server.engine.request import Lane, Request


def chain_root(adapter: AdapterRef | None, salt: str = "") -> bytes:
    """Where the hash chain of a lane's blocks starts.

    Keys and values depend on the adapter's weights, so the chain starts from its revision, never from its name: a
    name can come to mean other weights, and the same weights can have two. Each part is tagged with its domain and
    length, so that no value of one part (a salt that equals an adapter's revision, say) can read as another.
    """
    parts = [b"adapter", adapter.revision.encode()] if adapter else [b"base"]
    if salt:
        parts += [b"salt", salt.encode()]
    return _digest(b"".join(len(part).to_bytes(4, "little") + part for part in parts))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class KVCache:
    """Hands blocks to lanes, and finds the blocks of a shared prefix.

    A block is committed (its hash made known) once all its tokens are computed. Blocks are freed last first, so that
    a prefix outlives the tokens that followed it.
    """

    def __init__(
        self, num_blocks: int, block_size: int, memory: BlockMemory | None = None, num_certain: int | None = None
    ) -> None:
        """num_blocks: the most that there can be, out of `memory`; None: nobody else wants any. num_certain: so many of
        them there always are, whatever others hold; None: all."""
        self.block_size = block_size
        self.pool = BlockPool(num_blocks, memory)
        self.num_certain_blocks = num_blocks if num_certain is None else num_certain
        self.num_prefix_queries = 0  # prompt tokens looked up
        self.num_prefix_hits = 0  # and found

    @property
    def capacity(self) -> int:
        """Tokens that one lane can hold if it is alone."""
        return self.num_certain_blocks * self.block_size

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def max_blocks(self, request: Request) -> int:
        """Blocks that it can come to need."""
        return sum(self.num_blocks(lane.max_len) for lane in request.lanes)

    def num_held_blocks(self, request: Request) -> int:
        held = 0
        for lane in request.lanes:
            held += len(lane.block_table)
        return held

    def num_missing_blocks(self, request: Request) -> int:
        """Blocks that it needs for all its tokens and does not hold yet."""
        missing = 0
        for lane in request.lanes:  # loops: asked of every request that runs, in every step in which others wait
            missing += max(0, -(-(len(lane.tokens) + request.num_awaited) // self.block_size) - len(lane.block_table))
        return missing

    def attach_prefix(self, request: Request) -> None:
        """Give a request that holds no blocks the cached blocks of its lanes' longest known prefixes.

        A prompt of which something is to be told that takes all its tokens is computed from its first on.
        """
        untold = request.untold
        for lane in request.lanes:
            if untold is None or not untold.needs_all_tokens or lane is not request.first:
                self._attach(lane)

    def grow(self, chunks: Sequence[tuple[Lane, int]]) -> bool:
        """Hold blocks for so many more tokens of each lane. False, and nothing changed, if there are not enough."""
        missing = 0
        for lane, count in chunks:
            missing += max(0, self.num_blocks(lane.num_computed_tokens + count) - len(lane.block_table))
        if missing:
            if not self.pool.make_ready(missing):
                return False
            for lane, count in chunks:
                own = self.num_blocks(lane.num_computed_tokens + count) - len(lane.block_table)
                lane.block_table += self.pool.take(max(0, own))
        return True

    def commit(self, lane: Lane, num_tokens: int) -> None:
        """Make the blocks known that its first `num_tokens` fill, which were computed."""
        full = num_tokens // self.block_size
        if full <= lane.num_committed_blocks:
            return
        self._extend_hashes(lane, full)
        for index in range(lane.num_committed_blocks, full):
            self.pool.remember(lane.block_table[index], lane.block_hashes[index])
        lane.num_committed_blocks = full

    def release(self, request: Request) -> None:
        for lane in request.lanes:
            for block in reversed(lane.block_table):
                self.pool.release(block)
            lane.block_table = []
            lane.num_committed_blocks = 0
            lane.num_computed_tokens = 0

    def count_prefix(self, request: Request) -> None:
        """Statistics of a first admission."""
        request.num_cached_tokens = request.first.num_computed_tokens
        for lane in request.lanes:
            self.num_prefix_queries += lane.prompt_len
            self.num_prefix_hits += lane.num_computed_tokens

    def check(self, requests: Iterable[Request]) -> None:
        held: Counter[Block] = Counter()
        for lane in (lane for request in requests for lane in request.lanes):
            assert len(set(lane.block_table)) == len(lane.block_table)
            assert lane.num_computed_tokens <= len(lane.block_table) * self.block_size
            assert lane.num_committed_blocks <= len(lane.block_table)
            held.update(lane.block_table)
        self.pool.check(held)

    def _attach(self, lane: Lane) -> None:
        """At least one token is left to compute, for its logits."""
        assert not lane.block_table and lane.num_computed_tokens == 0
        reusable = (len(lane.tokens) - 1) // self.block_size
        self._extend_hashes(lane, reusable)
        for index, content in enumerate(lane.block_hashes[:reusable]):
            block = self.pool.find(content)
            if block is None:
                self.pool.missed(lane.block_hashes[index:reusable])
                break
            self.pool.touch(block)
            lane.block_table.append(block)
        lane.num_committed_blocks = len(lane.block_table)
        lane.num_computed_tokens = len(lane.block_table) * self.block_size

    def _extend_hashes(self, lane: Lane, count: int) -> None:
        while len(lane.block_hashes) < count:
            index = len(lane.block_hashes)
            parent = lane.block_hashes[-1] if index else chain_root(lane.adapter, lane.salt)
            tokens = lane.tokens[index * self.block_size : (index + 1) * self.block_size]
            lane.block_hashes.append(_digest(parent + array("q", tokens).tobytes()))
