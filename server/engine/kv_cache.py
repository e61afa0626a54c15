"""The KV cache as bookkeeping: block tables of requests, and reuse of prefixes between them."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable

from adapters_store.ref import AdapterRef
from server.engine.block_pool import Block, BlockPool
from server.engine.request import Request


def chain_root(adapter: AdapterRef | None) -> bytes:
    """Where the hash chain of a request's blocks starts.

    Keys and values depend on the adapter's weights, so the chain starts from its revision, never from its name: a
    name can come to mean other weights. Each part is tagged with its domain and length, so that no value of one part
    (a salt that equals an adapter's name, say) can read as another.
    """
    parts = [b"adapter", adapter.revision.encode()] if adapter else [b"base"]
    return _digest(b"".join(len(part).to_bytes(4, "little") + part for part in parts))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class KVCache:
    """Hands blocks to requests, and finds the blocks of a shared prefix.

    A block is committed (its hash made known) once all its tokens are computed. Blocks are freed last first, so that
    a prefix outlives the tokens that followed it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.num_prefix_queries = 0  # prompt tokens looked up
        self.num_prefix_hits = 0  # and found

    @property
    def capacity(self) -> int:
        """Tokens that one request could hold if it were alone."""
        return self.pool.num_blocks * self.block_size

    def attach_prefix(self, request: Request) -> None:
        """Give a request that holds no blocks the cached blocks of its longest known prefix.

        At least one token is left to compute, for its logits.
        """
        assert not request.block_table and request.num_computed_tokens == 0
        reusable = (len(request.tokens) - 1) // self.block_size
        self._extend_hashes(request, reusable)
        for content in request.block_hashes[:reusable]:
            block = self.pool.find(content)
            if block is None:
                break
            self.pool.touch(block)
            request.block_table.append(block)
        request.num_committed_blocks = len(request.block_table)
        request.num_computed_tokens = len(request.block_table) * self.block_size

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that so many tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def num_missing_blocks(self, request: Request) -> int:
        """Blocks that it needs for all its tokens and does not hold yet."""
        return max(0, self.num_blocks(len(request.tokens)) - len(request.block_table))

    def grow(self, request: Request, num_new: int) -> bool:
        """Hold blocks for `num_new` more tokens. False, and nothing changed, if there are not enough."""
        needed = self.num_blocks(request.num_computed_tokens + num_new) - len(request.block_table)
        if needed > self.pool.num_free:
            return False
        if needed > 0:
            request.block_table += self.pool.take(needed)
        return True

    def commit(self, request: Request) -> None:
        """Make the blocks known that the last step filled."""
        full = request.num_computed_tokens // self.block_size
        self._extend_hashes(request, full)
        for index in range(request.num_committed_blocks, full):
            self.pool.remember(request.block_table[index], request.block_hashes[index])
        request.num_committed_blocks = full

    def release(self, request: Request) -> None:
        for block in reversed(request.block_table):
            self.pool.release(block)
        request.block_table = []
        request.num_committed_blocks = 0
        request.num_computed_tokens = 0

    def count_prefix(self, request: Request) -> None:
        """Statistics of a first admission."""
        request.num_cached_tokens = request.num_computed_tokens
        self.num_prefix_queries += request.prompt_len
        self.num_prefix_hits += request.num_computed_tokens

    def check(self, requests: Iterable[Request]) -> None:
        held: Counter[Block] = Counter()
        for request in requests:
            assert len(set(request.block_table)) == len(request.block_table)
            assert request.num_computed_tokens <= len(request.block_table) * self.block_size
            assert request.num_committed_blocks <= len(request.block_table)
            held.update(request.block_table)
        self.pool.check(held)

    def _extend_hashes(self, request: Request, count: int) -> None:
        while len(request.block_hashes) < count:
            index = len(request.block_hashes)
            parent = request.block_hashes[-1] if index else chain_root(request.adapter)
            tokens = request.tokens[index * self.block_size : (index + 1) * self.block_size]
            request.block_hashes.append(_digest(parent + array("q", tokens).tobytes()))
