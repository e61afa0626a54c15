"""Continuous batching: each step, which requests compute how many tokens.

One rule covers chunked prefill, prefix reuse and preemption: a step hands out tokens so that every request's
`num_computed_tokens` catches up with its tokens, under a budget. Requests that run are served first, in order of
admission; then waiting ones are admitted. The scheduler does no I/O and knows no clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from adapters_store.ref import AdapterRef
from server.engine.adapter_users import AdapterUsers
from server.engine.kv_cache import KVCache
from server.engine.request import FinishReason, Request, Status
from server.engine.residency import BASE_SLOT, AdapterFailed, Residency, Slot, Wait


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
        self.waiting: dict[int, Request] = {}  # by id, in order of service; preempted requests come first
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
        self.waiting[request.id] = request

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
        preemptions = self.num_preemptions
        plan = self._serve_running()
        if self.num_preemptions > preemptions:  # memory is short: admitting more would only preempt again
            return plan, []
        return plan, self._admit(plan)

    def _serve_running(self) -> list[Scheduled]:
        plan: list[Scheduled] = []
        budget = self._limits.tokens_per_step
        index = 0
        while index < len(self.running):
            request = self.running[index]
            # only the newest can still be in its prompt: while it takes what the others leave, nobody is admitted
            count = min(request.num_uncomputed_tokens, budget)
            assert count == 1 or request is self.running[-1]
            if not self._make_room(request, count):
                break  # it was the newest of all and gave way itself
            plan.append(Scheduled(request, request.num_computed_tokens, count))
            budget -= count
            index += 1
        return plan

    def _make_room(self, request: Request, count: int) -> bool:
        """Blocks for `count` tokens, if need be by preempting newer requests. False if `request` itself went."""
        while not self._kv_cache.grow(request, count):
            victim = self.running.pop()
            self._stop_running(victim)
            victim.status = Status.WAITING
            self.waiting = {victim.id: victim, **self.waiting}
            self.num_preemptions += 1
            if victim is request:
                return False
        return True

    def _admit(self, plan: list[Scheduled]) -> list[Emitted]:
        """Start waiting requests, in order, as long as budget, places and blocks last; adds to `plan`."""
        budget = self._limits.tokens_per_step - sum(scheduled.num_tokens for scheduled in plan)
        starved = self._starved()
        failed: list[Emitted] = []
        absent: dict[AdapterRef | None, Wait] = {}  # found so in this step: a thousand requests may want the same one
        for request in list(self.waiting.values()):
            if request.id not in self.waiting:  # it failed together with an earlier one
                continue
            if budget == 0 or len(self.running) == self._limits.max_running:
                break
            if self._is_held_back(request, starved):
                continue
            try:
                slot = absent.get(request.adapter) or self._pin(request)
            except AdapterFailed as error:
                together = [it for it in self.waiting.values() if it.adapter == request.adapter]
                failed += [self._finish(it, FinishReason.ERROR, str(error)) for it in together]
                continue
            if isinstance(slot, Wait):  # passed over, never a wall: those behind it may run
                absent[request.adapter] = slot
                request.num_skips += slot is Wait.NO_ROOM
                continue
            scheduled = self._start(request, slot, budget)
            if scheduled is None:
                break  # first come, first served for blocks: else a large request would wait for ever
            plan.append(scheduled)
            budget -= scheduled.num_tokens
        return failed

    def _start(self, request: Request, slot: Slot, budget: int) -> Scheduled | None:
        self._kv_cache.attach_prefix(request)
        count = min(request.num_uncomputed_tokens, budget)
        if not self._kv_cache.grow(request, count):
            self._kv_cache.release(request)
            self._unpin(request)
            return None
        if not request.was_admitted:
            self._kv_cache.count_prefix(request)
            request.was_admitted = True
        del self.waiting[request.id]
        self.running.append(request)
        request.status = Status.RUNNING
        request.slot = slot
        request.num_skips = 0
        return Scheduled(request, request.num_computed_tokens, count)

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
        """The first request that was passed over too often for want of adapter room."""
        waiting = self.waiting.values()
        return next((request for request in waiting if request.num_skips > self._limits.max_skips), None)

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
            del self.waiting[request.id]
        request.status = Status.FINISHED
        del self._requests[request.id]
        if request.adapter is not None:
            self._adapters.let_go(request.adapter)
        return Emitted(request, token, reason, error)

    def check(self) -> None:
        """Every invariant of the engine, recomputed."""
        assert {request.id for request in self.running} | set(self.waiting) == set(self._requests)
        assert not {request.id for request in self.running} & set(self.waiting)
        assert len(self.running) <= self._limits.max_running
        assert all(request.status is Status.RUNNING for request in self.running)
        assert all(request.status is Status.WAITING and not request.block_table for request in self.waiting.values())
        assert all(request.num_uncomputed_tokens > 0 for request in self._requests.values())
        self._kv_cache.check(self._requests.values())
        self._adapters.check(self._requests.values())
        self._residency.check()
