"""Checks of adapters: what comes out through an adapter's slot, against the base with its weights merged.

Beside the scheduler and between steps: a check is no request, since it wants the logits of all its tokens and what it
computes with belongs to no lane. In each step it computes at most one prefill, so others wait no longer for it than for
a prompt that came along. It holds the adapter's revision until its end, as a request does; a pin and KV blocks only
within a step, so nothing is found taken between steps.
"""

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from adapters_store.ref import AdapterRef
from server.engine.adapter_users import AdapterUsers
from server.engine.block_pool import Block
from server.engine.kv_cache import KVCache
from server.engine.messages import AdapterChecked, CheckAdapter
from server.engine.request import Slot
from server.engine.residency import AdapterFailed, Residency, Wait


class Found(NamedTuple):
    """The largest difference between two logits, and the largest of those with merged weights (absolute values)."""

    max_difference: float
    max_logit: float


class CheckFailed(Exception):
    """There is nothing to compare; the message is for the user."""


class Comparison(Protocol):
    """One check under way. Both prefills write the KV blocks that they read, so they may be others each time."""

    def run_adapter(self, slot: Slot, blocks: Sequence[Block]) -> None:
        """The prefill through the adapter's slot. Raises CheckFailed."""

    def is_ready(self) -> bool:
        """Whether what the other prefill needs is there: it is read elsewhere, and that takes a while."""

    def run_merged(self, blocks: Sequence[Block]) -> Found:
        """The prefill with merged weights, and the end. Raises CheckFailed."""


class Checker(Protocol):
    """Computes checks on the device, between steps."""

    def refusal(self, num_tokens: int) -> str | None:
        """Why so many tokens can not be compared, if so."""

    def compare(self, ref: AdapterRef, num_tokens: int) -> Comparison:
        """Called while the adapter is on the device. It is registered until the comparison has ended."""


class Checks:
    """Those that are asked for, in order. One at a time is computed."""

    def __init__(self, checker: Checker, residency: Residency, adapters: AdapterUsers, kv_cache: KVCache) -> None:
        self._checker, self._residency = checker, residency
        self._adapters, self._kv_cache = adapters, kv_cache
        self._waiting: deque[CheckAdapter] = deque()
        self._comparison: Comparison | None = None  # of the first, once its adapter's prefill is over

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, check: CheckAdapter) -> list[AdapterChecked]:
        """Queue it; or say why it is refused."""
        problem = self._refusal(check)
        if problem is not None:
            return [AdapterChecked(check.check_id, None, error=problem)]
        self._adapters.hold_revision(check.ref)
        self._waiting.append(check)
        return []

    def step(self, gives_way: bool = False) -> list[AdapterChecked]:
        """One prefill of the first in line, if it can go on now. Its answer, if that was its last.

        `gives_way`: requests wait for adapters. Its own would take their room, and perhaps from one that needs several.
        """
        if not self._waiting or (gives_way and self._comparison is None):
            return []
        check = self._waiting[0]
        try:
            found = self._turn(check)
        except (AdapterFailed, CheckFailed) as failure:
            return [self._end(AdapterChecked(check.check_id, None, error=str(failure)))]
        return [] if found is None else [self._end(AdapterChecked(check.check_id, *found))]

    def _refusal(self, check: CheckAdapter) -> str | None:
        if not self._adapters.is_served(check.ref):
            return f"the adapter {check.ref.name!r} is no longer served"
        if not 0 < check.num_tokens <= self._kv_cache.capacity:
            return f"a check of {check.num_tokens} tokens; there is KV cache for 1 to {self._kv_cache.capacity}"
        return self._checker.refusal(check.num_tokens)

    def _turn(self, check: CheckAdapter) -> Found | None:
        pool, count = self._kv_cache.pool, self._kv_cache.num_blocks(check.num_tokens)
        if (self._comparison is not None and not self._comparison.is_ready()) or not pool.make_ready(count):
            return None
        if self._comparison is not None:
            with Borrowed(self._kv_cache, count) as blocks:
                return self._comparison.run_merged(blocks)
        slot = self._residency.acquire(check.ref)
        if not isinstance(slot, Wait):
            try:
                self._comparison = self._checker.compare(check.ref, check.num_tokens)
                with Borrowed(self._kv_cache, count) as blocks:
                    self._comparison.run_adapter(slot, blocks)
            finally:
                self._residency.release(check.ref)
        return None

    def _end(self, answer: AdapterChecked) -> AdapterChecked:
        self._comparison = None
        self._adapters.let_go_revision(self._waiting.popleft().ref)
        return answer

    def check(self) -> None:
        """Recompute what is kept incrementally."""
        self._adapters.check_revisions(Counter(check.ref for check in self._waiting))
        assert self._waiting or self._comparison is None


class Borrowed:
    """KV blocks for as long as a context lasts; what is written there is never known as anybody's prefix."""

    def __init__(self, kv_cache: KVCache, count: int) -> None:
        self._pool, self._blocks = kv_cache.pool, kv_cache.pool.take(count)

    def __enter__(self) -> list[Block]:
        return self._blocks

    def __exit__(self, *_: object) -> None:
        for block in reversed(self._blocks):
            self._pool.release(block)
