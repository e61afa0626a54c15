"""The engine: `step()` is the architecture, and the only loop that there is.

It does no I/O and knows no clock: messages in, events out. Served (loop.py), simulated and held to the oracle alike.
"""

import enum
from collections.abc import Iterable
from typing import NamedTuple

from server.engine.adapter_users import AdapterUsers
from server.engine.admission import problem_of
from server.engine.checks import Checker, Checks
from server.engine.kv_cache import KVCache
from server.engine.masks import Masks
from server.engine.messages import (
    Abort,
    AddAdapter,
    AddRequest,
    CheckAdapter,
    Event,
    RemoveAdapter,
    Shutdown,
    Stats,
    ToEngine,
    TokenEvent,
)
from server.engine.plan import Pending, Plan, Runner
from server.engine.request import FinishReason, Request
from server.engine.residency import Residency
from server.engine.scheduler import CannotServe, Scheduler, SchedulerLimits
from server.engine.step_budget import StepBudget, Work, work_of


class Pace(enum.Enum):
    """How soon the next step is wanted."""

    BUSY = enum.auto()  # at once
    AWAITING_MASKS = enum.auto()  # very soon: nothing can run until one is there
    LOADING = enum.auto()  # soon: nothing can run until a transfer is over, or a check's next turn
    IDLE = enum.auto()  # when a message comes


class Launched(NamedTuple):
    """A step whose outputs are not known."""

    plan: Plan
    pending: Pending


class Engine:
    """With `limits.overlaps`, one step is in flight: while the device computes it, the outputs of the one before are
    read, and the next one is planned with tokens that only the device knows."""

    def __init__(
        self, limits: SchedulerLimits, kv_cache: KVCache, runner: Runner, residency: Residency, checker: Checker,
        masks: Masks,
    ) -> None:  # fmt: skip
        self._kv_cache, self._runner, self._residency = kv_cache, runner, residency
        self._adapters = AdapterUsers(residency)
        self._step_budget = StepBudget(limits.tokens_per_step, limits.target_inter_token_s)
        self.scheduler = Scheduler(limits, kv_cache, residency, self._adapters, self._step_budget, masks)
        self._checks = Checks(checker, residency, self._adapters, kv_cache)
        self._overlaps = limits.overlaps
        self._in_flight: Launched | None = None
        self._work: Work | None = None  # of the last step whose outputs were read, if it did nothing else
        self.pace = Pace.BUSY
        self.now = 0.0  # of the step that is being made
        self.is_shut_down = False
        self._vocab_size = limits.vocab_size
        self._num_steps = 0
        self._num_computed_tokens = 0

    def step(self, messages: Iterable[ToEngine], now: float = 0.0) -> list[Event]:
        """Take in what has come, schedule, launch, record. now: seconds of a clock that only goes forward."""
        self.now = now
        events: list[Event] = [*self._apply(messages)]
        plan, failed = self.scheduler.schedule(now)
        events += failed
        over = launched = self._launch(plan)
        if self._overlaps:
            over, self._in_flight = self._in_flight, launched
        if over is not None:
            events += self.scheduler.record(over.plan, over.pending.outputs())
        checked = self._checks.step(gives_way=self.scheduler.lacks_adapters)
        events += [*checked, *self._adapters.take_gone(), *self._residency.take_moved()]
        self._account(plan, over.plan if over else (), is_alone=not (checked or self._checks))
        return events

    def _launch(self, plan: Plan) -> Launched | None:
        if not plan:
            return None
        launched = Launched(plan, self._runner.launch(plan))
        self.scheduler.advance(plan)
        return launched

    def took(self, seconds: float) -> None:
        """The last step was so long: those to come are cut accordingly."""
        if self._work is not None:
            self._step_budget.took(self._work, seconds)

    def _apply(self, messages: Iterable[ToEngine]) -> list[Event]:
        events: list[Event] = []
        for message in messages:
            match message:
                case AddRequest():
                    events += self._add(message)
                case Abort(request_ids=ids):
                    events += [ended for ended in map(self.scheduler.abort, ids) if ended]
                case AddAdapter(ref=ref, package=package, root=root, pinned=pinned):
                    self._adapters.register(ref, package.located(root), pinned)
                case RemoveAdapter(ref=ref):
                    self._adapters.remove(ref)
                case CheckAdapter():
                    events += self._checks.add(message)
                case Shutdown():
                    self.is_shut_down = True
                case _:
                    raise TypeError(f"the engine is running and takes no {type(message).__name__}")
        return events

    def _add(self, it: AddRequest) -> list[TokenEvent]:
        problem = problem_of(it, self._vocab_size)
        if problem is not None:
            return [TokenEvent(it.request_id, None, FinishReason.ERROR, problem)]
        try:
            request = Request(
                it.request_id, it.lanes, it.max_tokens, it.sampling, it.stop_token_ids, it.group, it.weight,
                it.priority, it.of_prompt, self.now, it.grammar,
            )  # fmt: skip
            self.scheduler.add(request)
        except CannotServe as refusal:
            return [TokenEvent(it.request_id, None, FinishReason.ERROR, str(refusal))]
        return []

    def _account(self, plan: Plan, over: Plan, is_alone: bool) -> None:
        """over: what was waited for. is_alone: nothing else was computed. Where the logits of whole prompts are made,
        it took longer."""
        is_learnt = self._step_budget.has_target and is_alone and over
        is_usual = is_learnt and not any(it.lane.request.of_prompt is not None for it in over)
        self._work = work_of(over) if is_usual else None
        self._num_steps += bool(plan)
        self._num_computed_tokens += sum([it.num_tokens for it in plan])
        if plan or over:
            self.pace = Pace.BUSY
        elif self.scheduler.awaits_masks:
            self.pace = Pace.AWAITING_MASKS
        elif self.scheduler.has_requests or self._residency.is_loading() or self._checks:
            self.pace = Pace.LOADING
        else:
            self.pace = Pace.IDLE

    def stats(self) -> Stats:
        pool = self._kv_cache.pool
        return Stats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            kv_blocks_used=pool.num_held,
            kv_blocks_total=pool.num_within_reach,
            prefix_queries=self._kv_cache.num_prefix_queries,
            prefix_hits=self._kv_cache.num_prefix_hits,
            preemptions=self.scheduler.num_preemptions,
            steps=self._num_steps,
            computed_tokens=self._num_computed_tokens,
            memory=self._residency.memory(),
            masks=self.scheduler.mask_stats,
        )

    def check(self) -> None:
        """Every invariant, recomputed."""
        self.scheduler.check()
        self._checks.check()
