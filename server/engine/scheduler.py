"""Continuous batching: each step, which requests compute how many tokens.

One rule covers chunked prefill, prefix reuse and preemption: a step hands out tokens so that every request's
`num_computed_tokens` catches up with its tokens, under a budget. Requests that run are served first, in order of
admission; then waiting ones are admitted, group by group in turn (queue.py), and a group that holds more than its share
gives way (shares.py). The scheduler does no I/O and knows no clock.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from adapters_store.ref import AdapterRef
from server.engine.adapter_users import AdapterUsers
from server.engine.kv_cache import KVCache
from server.engine.queue import WaitingQueue
from server.engine.request import FinishReason, Group, Request, Status
from server.engine.residency import BASE_SLOT, AdapterFailed, Residency, Slot, Wait
from server.engine.shares import Shares


class CannotServe(Exception):
    """The request is refused at the door; the message carries the numbers."""


@dataclass(frozen=True)
class SchedulerLimits:
    tokens_per_step: int
    max_running: int
    max_waiting: int
    max_skips: int  # see Scheduler._is_held_back


@dataclass(frozen=True)
class Scheduled:
    """In this step, compute `num_tokens` tokens of `request`, from `start` on; sample if that reaches the end."""

    request: Request
    start: int
    num_tokens: int

    @property
    def samples(self) -> bool:
        return self.start + self.num_tokens == len(self.request.tokens)


class _Plan:
    """A step as it takes shape, and the tokens that are left of its budget."""

    def __init__(self, budget: int) -> None:
        self.scheduled: dict[int, Scheduled] = {}  # by request
        self.cut: list[Request] = []  # those that could compute more
        self.budget = budget

    def add(self, request: Request, count: int) -> None:
        self.scheduled[request.id] = Scheduled(request, request.num_computed_tokens, count)
        self.budget -= count
        if count < request.num_uncomputed_tokens:
            self.cut.append(request)

    def drop(self, request: Request) -> None:
        scheduled = self.scheduled.pop(request.id, None)
        self.budget += scheduled.num_tokens if scheduled else 0


@dataclass(frozen=True)
class Emitted:
    """What a step produced for one request: a token, an end, or both."""

    request: Request
    token: int | None = None
    finish: FinishReason | None = None
    error: str | None = None


class Scheduler:
    def __init__(
        self, limits: SchedulerLimits, kv_cache: KVCache, residency: Residency, adapters: AdapterUsers
    ) -> None:
        self._limits = limits
        self._kv_cache = kv_cache
        self._residency = residency
        self._adapters = adapters
        self._requests: dict[int, Request] = {}
        self._group_sizes: Counter[Group] = Counter()  # unfinished requests
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # in order of admission
        self.num_preemptions = 0

    # -- requests come and go -----------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises CannotServe if it can never run, or the queue is full."""
        if request.max_len > self._kv_cache.capacity:
            raise CannotServe(
                f"prompt ({request.prompt_len} tokens) and max_tokens ({request.max_tokens}) need "
                f"{request.max_len} tokens of KV cache; there are {self._kv_cache.capacity}"
            )
        if len(self.waiting) >= self._limits.max_waiting:
            raise CannotServe(f"{len(self.waiting)} requests are waiting, as many as are allowed")
        if request.adapter is not None:
            if not self._adapters.is_served(request.adapter):
                raise CannotServe(f"the adapter {request.adapter.name!r} is no longer served")
            self._adapters.hold(request.adapter)
        self._requests[request.id] = request
        self._group_sizes[request.group] += 1
        self.waiting.push(request)

    def abort(self, request_id: int) -> Emitted | None:
        """End a request at its owner's wish. None if it has already ended."""
        request = self._requests.get(request_id)
        return self._finish(request, FinishReason.ABORT) if request else None

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    # -- one step -----------------------------------------------------------

    def schedule(self) -> tuple[list[Scheduled], list[Emitted]]:
        """The tokens of the next step, and requests that ended instead because their adapter failed to load."""
        self._residency.poll()
        plan = _Plan(self._limits.tokens_per_step)
        preemptions = self.num_preemptions
        self._serve_running(plan)
        failed = self._admit(plan, is_short=self.num_preemptions > preemptions)
        self._spend_the_rest(plan)
        return list(plan.scheduled.values()), failed

    def _serve_running(self, plan: _Plan) -> None:
        """At least one token for each that runs, in order of admission."""
        running = tuple(self.running)
        for index, request in enumerate(running):
            if request.status is not Status.RUNNING:
                continue  # it gave way to an older one
            unserved = len(self.running) - len(plan.scheduled) - 1
            count = self._chunk(request, plan.budget - unserved, islice(running, index + 1, None))
            if self._make_room(request, count, plan):
                plan.add(request, count)

    def _chunk(self, request: Request, budget: int, behind: Iterable[Request]) -> int:
        """How many of its tokens a running request computes. A long prompt leaves half of the budget while another
        group's prompt stands behind it, so that a short one does not wait until the long one is through."""
        needed = request.num_uncomputed_tokens
        if needed <= max(1, budget // 2):
            return needed
        is_awaited = self.waiting.has_others(request.group) or any(
            other.group != request.group and other.num_uncomputed_tokens > 1 for other in behind
        )
        return max(1, budget // 2) if is_awaited else min(needed, budget)

    def _make_room(self, request: Request, count: int, plan: _Plan) -> bool:
        """Blocks for `count` tokens, if need be by preempting others. False if `request` itself went."""
        while not self._kv_cache.grow(request, count):
            victim = next(self._shares().beyond(), self.running[-1])
            self._preempt(victim, plan)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request, plan: _Plan) -> None:
        plan.drop(victim)
        self.running.remove(victim)
        self._stop_running(victim)
        victim.status = Status.WAITING
        self.waiting.push_front(victim)
        self.num_preemptions += 1

    def _shares(self) -> Shares:
        return Shares(self.running, len(self._group_sizes), self._limits.max_running, self._kv_cache)

    def _admit(self, plan: _Plan, is_short: bool) -> list[Emitted]:
        """Start waiting requests, in order, as long as budget, places and blocks last; adds to `plan`.

        `is_short`: a request that ran was preempted for want of blocks in this step. To admit more would only preempt
        again, unless it is at the cost of a group that holds more than its share.
        """
        failed: list[Emitted] = []
        if not self.waiting:
            return failed
        shares = self._shares()
        if not self._is_open(plan, is_short) and not any(shares.beyond()):
            return failed
        starved, is_walled = self._starved(), False
        absent: dict[AdapterRef | None, Wait] = {}  # found so in this step: a thousand requests may want the same one
        for request in self._candidates(shares):
            may_displace = not shares.is_used_up(request.group)
            if not self._is_open(plan, is_short) and not (may_displace and any(shares.beyond())):
                break
            if self._is_held_back(request, starved) or (is_walled and not shares.lets_pass(request)):
                continue
            try:
                slot = absent.get(request.adapter) or self._pin(request)
            except AdapterFailed as error:
                together = [it for it in self.waiting if it.adapter == request.adapter]
                failed += [self._finish(it, FinishReason.ERROR, str(error)) for it in together]
                continue
            if isinstance(slot, Wait):  # passed over, never a wall: those behind it may run
                absent[request.adapter] = slot
                request.num_skips += slot is Wait.NO_ROOM
                continue
            if not self._start(request, slot, plan, shares):
                is_walled = True  # first come, first served for blocks: else a large request would wait for ever
                request.num_passes += 1
                if request.num_passes > self._limits.max_skips:
                    break
        return failed

    def _is_open(self, plan: _Plan, is_short: bool) -> bool:
        """Whether a request may start without taking anything from another."""
        return plan.budget > 0 and len(self.running) < self._limits.max_running and not is_short

    def _candidates(self, shares: Shares) -> Iterator[Request]:
        """Who waits, in order. Groups that have used up their share come last, for what nobody else wants."""
        later: list[Request] = []
        for request in self.waiting.order():
            if request.status is not Status.WAITING:
                continue  # its adapter failed to load for another request
            if shares.is_used_up(request.group):
                later.append(request)
            else:
                yield request
        yield from (request for request in later if request.status is Status.WAITING)

    def _start(self, request: Request, slot: Slot, plan: _Plan, shares: Shares) -> bool:
        """Let a pinned request run, in the place and the blocks of others where they have more than their share.

        Blocks for all its tokens must be there, not only for those of this step: prompts that are begun and cannot be
        ended hold blocks for nothing, until they are preempted.
        """
        self._kv_cache.attach_prefix(request)
        if not self._make_way(request, plan, shares):
            self._kv_cache.release(request)
            self._unpin(request)
            return False
        count = min(request.num_uncomputed_tokens, plan.budget)
        has_grown = self._kv_cache.grow(request, count)
        assert has_grown
        if not request.was_admitted:
            self._kv_cache.count_prefix(request)
            request.was_admitted = True
        self.waiting.remove(request)
        self.waiting.charge(request.group)
        self.running.append(request)
        request.status = Status.RUNNING
        request.slot = slot
        request.num_skips = request.num_passes = 0
        shares.take(request)
        plan.add(request, count)
        return True

    def _make_way(self, request: Request, plan: _Plan, shares: Shares) -> bool:
        """Blocks, a place and a token of the budget, if need be out of what others hold beyond their share. Nothing is
        taken where it would not be enough, nor for a group that would then be beyond its own."""
        missing = self._kv_cache.num_missing_blocks(request)
        lacks_blocks = missing - shares.num_free_blocks
        lacks_others = len(self.running) == self._limits.max_running or plan.budget == 0
        victims: list[Request] = []
        for victim in shares.beyond() if shares.has_room_for(request.group, missing) else ():
            if lacks_blocks <= 0 and not lacks_others:
                break
            victims.append(victim)
            lacks_blocks -= shares.num_blocks_of(victim)
            lacks_others = False
        if lacks_blocks > 0 or lacks_others:
            return False
        for victim in victims:
            shares.give_back(victim)
            self._preempt(victim, plan)
        # blocks that victims share with others are not free yet
        return missing <= shares.num_free_blocks and plan.budget > 0

    def _spend_the_rest(self, plan: _Plan) -> None:
        """Long prompts take what they left for others and nobody took."""
        for request in tuple(plan.cut):
            scheduled = plan.scheduled.get(request.id)  # it may have given way
            if scheduled is None or plan.budget == 0:
                continue
            count = min(request.num_uncomputed_tokens, scheduled.num_tokens + plan.budget)
            if self._kv_cache.grow(request, count):
                plan.drop(request)
                plan.add(request, count)

    def update(self, plan: list[Scheduled], sampled: Mapping[int, int | None]) -> list[Emitted]:
        """Record a finished step. `sampled` has the id of every request that was to sample; None ends it."""
        emitted: list[Emitted] = []
        for scheduled in plan:
            request = scheduled.request
            samples = scheduled.samples
            request.num_computed_tokens += scheduled.num_tokens
            self._kv_cache.commit(request)
            if not samples:
                continue
            token = sampled[request.id]
            if token is None:
                emitted.append(self._finish(request, FinishReason.ERROR, "the model's output is not finite"))
                continue
            request.tokens.append(token)
            reason = request.finish_reason_after(token)
            emitted.append(self._finish(request, reason, token=token) if reason else Emitted(request, token))
        return emitted

    # -- adapters -----------------------------------------------------------

    def _starved(self) -> Request | None:
        """The request that was passed over most often for want of adapter room, if that was too often."""
        starving = [request for request in self.waiting if request.num_skips > self._limits.max_skips]
        if not starving:
            return None
        there = {request.adapter for request in self.running}  # these want a place, not room for their adapter
        candidates = (request for request in starving if request.adapter not in there)
        return max(candidates, key=lambda request: request.num_skips, default=None)

    @staticmethod
    def _is_held_back(request: Request, starved: Request | None) -> bool:
        """While a request starves for adapter room, others may not pin adapters: their pins drain as requests end.

        Base requests need no room and go on.
        """
        return starved is not None and request.adapter is not None and request.adapter != starved.adapter

    def _pin(self, request: Request) -> Slot | Wait:
        return BASE_SLOT if request.adapter is None else self._residency.acquire(request.adapter)

    def _unpin(self, request: Request) -> None:
        if request.adapter is not None:
            self._residency.release(request.adapter)

    # -- ends -----------------------------------------------------------

    def _stop_running(self, request: Request) -> None:
        """Give back blocks and pin, not the place in `running`, which differs by caller."""
        self._kv_cache.release(request)
        self._unpin(request)
        request.slot = BASE_SLOT

    def _finish(
        self, request: Request, reason: FinishReason, error: str | None = None, token: int | None = None
    ) -> Emitted:
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self._stop_running(request)
        else:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        del self._requests[request.id]
        self._group_sizes[request.group] -= 1
        if not self._group_sizes[request.group]:
            del self._group_sizes[request.group]
        if request.adapter is not None:
            self._adapters.let_go(request.adapter)
        return Emitted(request, token, reason, error)

    def check(self) -> None:
        """Every invariant of the engine, recomputed."""
        waiting = {request.id for request in self.waiting}
        assert {request.id for request in self.running} | waiting == set(self._requests)
        assert not {request.id for request in self.running} & waiting
        assert len(self.running) <= self._limits.max_running
        assert all(request.status is Status.RUNNING for request in self.running)
        assert all(request.status is Status.WAITING and not request.block_table for request in self.waiting)
        assert self._group_sizes == Counter(request.group for request in self._requests.values())
        self.waiting.check()
        assert all(request.num_uncomputed_tokens > 0 for request in self._requests.values())
        self._kv_cache.check(self._requests.values())
        self._adapters.check(self._requests.values())
        self._residency.check()
