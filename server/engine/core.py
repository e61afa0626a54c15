"""The engine: `step()` is the architecture, and the only loop that there is.

It does no I/O and knows no clock: messages in, events out. Served (loop.py), simulated and held to the oracle alike.
"""

import enum
from collections.abc import Iterable

from server.engine.adapter_users import AdapterUsers
from server.engine.kv_cache import KVCache
from server.engine.messages import Abort, AddAdapter, AddRequest, RemoveAdapter, Shutdown, Stats, ToEngine, TokenEvent
from server.engine.plan import Plan, Runner
from server.engine.request import FinishReason, Request
from server.engine.residency import Residency
from server.engine.scheduler import CannotServe, Scheduler, SchedulerLimits


class Pace(enum.Enum):
    """How soon the next step is wanted."""

    BUSY = enum.auto()  # at once
    LOADING = enum.auto()  # soon: nothing can run until a transfer is over
    IDLE = enum.auto()  # when a message comes


class Engine:
    def __init__(self, limits: SchedulerLimits, kv_cache: KVCache, runner: Runner, residency: Residency) -> None:
        self._kv_cache, self._runner, self._residency = kv_cache, runner, residency
        self._adapters = AdapterUsers(residency)
        self.scheduler = Scheduler(limits, kv_cache, residency, self._adapters)
        self.pace = Pace.BUSY
        self.is_shut_down = False
        self._num_steps = 0
        self._num_computed_tokens = 0

    def step(self, messages: Iterable[ToEngine]) -> list[TokenEvent]:
        """Take in what has come, schedule, launch, record."""
        events = self._apply(messages)
        plan, failed = self.scheduler.schedule()
        events += failed
        if plan:
            pending = self._runner.launch(plan)
            self.scheduler.advance(plan)
            events += self.scheduler.record(plan, pending.outputs())
        self._account(plan)
        return events

    def _apply(self, messages: Iterable[ToEngine]) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        for message in messages:
            match message:
                case AddRequest():
                    events += self._add(message)
                case Abort(request_ids=ids):
                    events += [ended for ended in map(self.scheduler.abort, ids) if ended]
                case AddAdapter(ref=ref, package=package):
                    self._adapters.register(ref, package)
                case RemoveAdapter(ref=ref):
                    self._adapters.remove(ref)
                case Shutdown():
                    self.is_shut_down = True
                case _:
                    raise TypeError(f"the engine is running and takes no {type(message).__name__}")
        return events

    def _add(self, it: AddRequest) -> list[TokenEvent]:
        if not it.lanes or not all(lane.prompt for lane in it.lanes) or it.max_tokens < 0:
            problem = "a request has lanes, each with a prompt, and max_tokens from 0 on"
            return [TokenEvent(it.request_id, None, FinishReason.ERROR, problem)]
        try:
            request = Request(it.request_id, it.lanes, it.max_tokens, it.sampling, it.stop_token_ids, it.group)
            self.scheduler.add(request)
        except CannotServe as refusal:
            return [TokenEvent(it.request_id, None, FinishReason.ERROR, str(refusal))]
        return []

    def _account(self, plan: Plan) -> None:
        self._num_steps += bool(plan)
        self._num_computed_tokens += sum(scheduled.num_tokens for scheduled in plan)
        if plan:
            self.pace = Pace.BUSY
        elif self.scheduler.has_requests or self._residency.is_loading():
            self.pace = Pace.LOADING
        else:
            self.pace = Pace.IDLE

    def stats(self) -> Stats:
        pool = self._kv_cache.pool
        return Stats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_blocks_used=pool.num_blocks - pool.num_free,
            kv_blocks_total=pool.num_blocks,
            prefix_queries=self._kv_cache.num_prefix_queries,
            prefix_hits=self._kv_cache.num_prefix_hits,
            preemptions=self.scheduler.num_preemptions,
            steps=self._num_steps,
            computed_tokens=self._num_computed_tokens,
            adapters=self._residency.report(),
        )

    def check(self) -> None:
        """Every invariant, recomputed."""
        self.scheduler.check()
