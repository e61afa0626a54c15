"""The engine: one synchronous loop. `step()` is the architecture."""

import time
from collections.abc import Callable
from typing import Protocol

from server.engine.adapter_users import AdapterUsers
from server.engine.kv_cache import KVCache
from server.engine.messages import (
    Abort,
    AdapterOnDevice,
    AddAdapter,
    AddRequest,
    RemoveAdapter,
    Shutdown,
    Stats,
    StepDone,
    ToEngine,
    ToFront,
    TokenEvent,
)
from server.engine.request import FinishReason, Request
from server.engine.residency import Residency
from server.engine.scheduler import CannotServe, Emitted, Scheduled, Scheduler, SchedulerLimits

IDLE_WAIT_MS = 500  # an idle engine says so this often
MAX_SILENCE_S = 1.0  # a busy one at least this often
LOADING_WAIT_MS = 5  # how soon to look again when requests wait for nothing but a transfer


class Runner(Protocol):
    """Computes a step on the device."""

    def run(self, plan: list[Scheduled]) -> dict[int, int | None]:
        """Compute the scheduled tokens. By id of each request that samples: its token, or None if there was none to
        sample (logits that are not finite)."""


class Inbox(Protocol):
    def receive_all(self, timeout_ms: int) -> list[ToEngine]: ...


class ReportingResidency(Residency, Protocol):
    def report(self) -> tuple[AdapterOnDevice, ...]:
        """What is on the device now."""


Publish = Callable[[ToFront], None]


class EngineCore:
    def __init__(
        self,
        limits: SchedulerLimits,
        kv_cache: KVCache,
        runner: Runner,
        residency: ReportingResidency,
        inbox: Inbox,
        publish: Publish,
    ) -> None:
        self._kv_cache = kv_cache
        self._runner = runner
        self._residency = residency
        self._adapters = AdapterUsers(residency)
        self._inbox = inbox
        self._publish = publish
        self.scheduler = Scheduler(limits, kv_cache, residency, self._adapters)
        self._steps = 0
        self._longest_step_s = 0.0
        self._computed_tokens = 0
        self._last_said = time.monotonic()
        self._wait_ms = 0  # how long the next step may wait for a message
        self.is_shut_down = False

    def step(self) -> None:
        """Drain the inbox, schedule, run, record, publish."""
        emitted = self._apply(self._inbox.receive_all(self._wait_ms))
        start = time.monotonic()
        plan, failed = self.scheduler.schedule()
        sampled = self._runner.run(plan) if plan else {}
        emitted += failed + self.scheduler.update(plan, sampled)
        self._account(plan, time.monotonic() - start)
        if emitted or not plan or self._is_silent():
            self._say(emitted)

    def _apply(self, messages: list[ToEngine]) -> list[Emitted]:
        emitted: list[Emitted] = []
        for message in messages:
            match message:
                case AddRequest():
                    emitted += self._add(message)
                case Abort(request_ids=ids):
                    emitted += [ended for ended in map(self.scheduler.abort, ids) if ended]
                case AddAdapter(ref=ref, package=package):
                    self._adapters.register(ref, package)
                case RemoveAdapter(ref=ref):
                    self._adapters.remove(ref)
                case Shutdown():
                    self.is_shut_down = True
                case _:
                    raise TypeError(f"the engine is running and takes no {type(message).__name__}")
        return emitted

    def _add(self, message: AddRequest) -> list[Emitted]:
        request = Request(
            message.request_id,
            message.prompt,
            message.max_tokens,
            message.sampling,
            message.adapter,
            message.stop_token_ids,
            message.group,
        )
        try:
            self.scheduler.add(request)
        except CannotServe as refusal:
            return [Emitted(request, finish=FinishReason.ERROR, error=str(refusal))]
        return []

    def _say(self, emitted: list[Emitted]) -> None:
        self._publish(StepDone([_event(item) for item in emitted], self._stats()))
        self._last_said = time.monotonic()

    def _is_silent(self) -> bool:
        """A long prefill emits nothing for many steps; a front that hears nothing would take us for dead."""
        return time.monotonic() - self._last_said > MAX_SILENCE_S

    def _account(self, plan: list[Scheduled], seconds: float) -> None:
        self._steps += bool(plan)
        self._longest_step_s = max(self._longest_step_s, seconds)
        self._computed_tokens += sum(scheduled.num_tokens for scheduled in plan)
        if plan:
            self._wait_ms = 0
        elif self.scheduler.has_requests or self._residency.is_loading():
            self._wait_ms = LOADING_WAIT_MS
        else:
            if self._wait_ms != IDLE_WAIT_MS:
                self.scheduler.check()  # busy until now: prove that nothing leaked
            self._wait_ms = IDLE_WAIT_MS

    def _stats(self) -> Stats:
        pool = self._kv_cache.pool
        return Stats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_blocks_used=pool.num_blocks - pool.num_free,
            kv_blocks_total=pool.num_blocks,
            prefix_queries=self._kv_cache.num_prefix_queries,
            prefix_hits=self._kv_cache.num_prefix_hits,
            preemptions=self.scheduler.num_preemptions,
            steps=self._steps,
            longest_step_s=self._longest_step_s,
            computed_tokens=self._computed_tokens,
            adapters=self._residency.report(),
        )


def _event(emitted: Emitted) -> TokenEvent:
    cached = emitted.request.num_cached_tokens if emitted.request.num_generated == 1 else 0
    return TokenEvent(emitted.request.id, emitted.token, emitted.finish, emitted.error, cached)
