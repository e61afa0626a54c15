"""Continuous batching: each step, which lanes compute how many tokens.

One rule covers chunked prefill, prefix reuse and preemption: a step hands out tokens so that every lane's
`num_computed_tokens` catches up with its tokens, under a budget (step_budget.py). Requests that run are served first
(prompts.py); then waiting ones start (starts.py), adapter by adapter and group by group in turn (queue.py), and whoever
holds more than their share gives way (shares.py). The scheduler does no I/O and reads no clock.

    schedule() -> plan      which tokens
    advance(plan)           they are being computed: the next plan may count on them
    record(plan, outputs)   what came of them
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from server.engine import prompts
from server.engine.adapter_users import AdapterUsers
from server.engine.at_work import AtWork
from server.engine.batch import Batch
from server.engine.constrained import Constrained
from server.engine.kv_cache import KVCache
from server.engine.masks import Masks
from server.engine.messages import MaskStats, TokenEvent
from server.engine.pins import worded
from server.engine.plan import LOGITS_PER_STEP, Draft, Output, Plan, Scheduled
from server.engine.queue import WaitingQueue
from server.engine.request import Fault, FinishReason, Lane, Request, Status, Token, ToldOfPrompt
from server.engine.residency import AdapterFailed, Residency
from server.engine.shares import Shares
from server.engine.soundness import Soundness
from server.engine.starts import Starts
from server.engine.step_budget import StepBudget
from server.engine.token_counters import TokenCounters


class CannotServe(Exception):
    """The request is refused at the door; the message carries the numbers."""


@dataclass(frozen=True)
class SchedulerLimits:
    tokens_per_step: int
    max_running: int  # lanes
    max_waiting: int
    max_skips: int  # see pins.Starvation
    logits_per_step: int = LOGITS_PER_STEP  # see Draft
    vocab_size: int = 1 << 31  # what prompts are made of
    target_inter_token_s: float = 0.0  # see StepBudget
    overlaps: bool = False  # a step is launched before the outputs of the one before are known (core.py)
    patience_s: float = 30.0  # see WaitingQueue


class Scheduler:
    def __init__(
        self,
        limits: SchedulerLimits,
        kv_cache: KVCache,
        residency: Residency,
        adapters: AdapterUsers,
        step_budget: StepBudget,
        masks: Masks,
    ) -> None:
        self._limits = limits
        self._step_budget = step_budget
        self._kv_cache = kv_cache
        self._residency = residency
        self._adapters = adapters
        self._requests: dict[int, Request] = {}
        self._at_work = AtWork()
        self._counters = TokenCounters()
        self._soundness = Soundness(residency)
        self.waiting = WaitingQueue(self._counters, limits.patience_s)
        self._constrained = Constrained(masks)
        self._batch = Batch(self.waiting, kv_cache, residency, self._constrained)
        self._failed: list[TokenEvent] = []  # in this step, for want of their adapters
        self._starts = Starts(limits.max_running, limits.max_skips, self.waiting, self._batch, self._counters, kv_cache,
                              residency, self._fail)  # fmt: skip

    # -- requests come and go -----------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises CannotServe if it can never run, or the queue is full."""
        self._require_room(request)
        if len(self.waiting) >= self._limits.max_waiting:
            raise CannotServe(f"{len(self.waiting)} requests are waiting, as many as are allowed")
        for adapter in request.adapters:
            if not self._adapters.is_served(adapter):
                raise CannotServe(f"the adapter {adapter.name!r} is no longer served")
        problem = self._residency.refusal(set(request.adapters))
        if problem is not None:
            raise CannotServe(problem)
        self._adapters.hold(request)
        self._requests[request.id] = request
        self._at_work.add(request)
        self.waiting.push(request)

    def _require_room(self, request: Request) -> None:
        """Raises CannotServe."""
        num_lanes, needed = len(request.lanes), self._kv_cache.max_blocks(request)
        if needed > self._kv_cache.num_certain_blocks:
            # lanes share no block, so each of several ends in one that is not full
            tokens = request.first.max_len if num_lanes == 1 else needed * self._kv_cache.block_size
            raise CannotServe(
                f"prompt ({sum(lane.prompt_len for lane in request.lanes)} tokens) and max_tokens "
                f"({request.max_tokens}) need {tokens} tokens of KV cache; there are {self._kv_cache.capacity}"
            )
        if num_lanes > self._limits.max_running:
            raise CannotServe(f"{num_lanes} lanes of one request; {self._limits.max_running} run together")

    def abort(self, request_id: int) -> TokenEvent | None:
        """End a request at its owner's wish. None if it has already ended."""
        request = self.request(request_id)
        return self._finish(request, FinishReason.ABORT) if request else None

    def request(self, request_id: int) -> Request | None:
        """One that has not ended."""
        return self._requests.get(request_id)

    @property
    def running(self) -> list[Request]:
        """In order of admission."""
        return self._batch.running

    @property
    def num_preemptions(self) -> int:
        return self._batch.num_preemptions

    @property
    def lacks_adapters(self) -> bool:
        """Whether, in the last step, a request waited for adapters to come to the device."""
        return self._starts.num_lacking > 0

    @property
    def mask_stats(self) -> MaskStats:
        return self._constrained.stats

    @property
    def awaits_masks(self) -> bool:
        """Whether a request that runs waits for its mask."""
        return bool(self._constrained.late)

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    # -- one step -----------------------------------------------------------

    def schedule(self, now: float = 0.0) -> tuple[list[Scheduled], list[TokenEvent]]:
        """The tokens of the next step, and requests that ended instead because their adapter failed to load, or no
        more masks come for them. now: seconds."""
        self._kv_cache.pool.now = now
        self._residency.poll(now)
        self._counters.settle(self._at_work.weights.keys())
        self.waiting.begin_step(now)
        self._failed = [
            self._finish(it.request, FinishReason.ERROR, it.reason, fault=it.fault) for it in self._constrained.poll()
        ]
        draft = Draft(self._budget(), self._limits.logits_per_step)
        preemptions = self.num_preemptions
        self._serve_running(draft)
        if self.waiting:
            self._starts.admit(draft, self._shares(), self.num_preemptions > preemptions, now)
            self._starts.prefetch()
        self._spend_the_rest(draft)
        return draft.plan, self._failed

    def _budget(self) -> int:
        """Tokens of this step: at least one for each lane that runs, and for those of who may start next."""
        if not self._step_budget.has_target:
            return self._limits.tokens_per_step
        startable, num_lanes = 0, self._batch.num_lanes
        if not self._starts.is_walled:  # else they wait for blocks, and a longer step would not bring them any
            ready = max(0, len(self.waiting) - self._starts.num_lacking)
            startable = max(0, min(ready, self._limits.max_running - num_lanes))
        ahead = self._counters.ahead({request.account for request in self.running}, self._limits.tokens_per_step / 2)
        first = next(self.waiting.order()) if startable else None
        load = prompts.load(self.running, num_lanes, startable, first, ahead)
        least = min(num_lanes + (len(first.lanes) if first else 0), self._limits.tokens_per_step)
        return max(least, self._step_budget.tokens(load))

    def _serve_running(self, draft: Draft) -> None:
        """At least one token for each lane that runs."""
        if self._serve_decodes(draft):
            return
        running = prompts.in_turn(self.running, self._counters.of)
        for index, request in enumerate(running):
            if request.status is not Status.RUNNING or not request.num_uncomputed_tokens:
                continue  # it gave way to an older one, or waits for what a launched step says
            if request.id in self._constrained.late:
                continue
            unserved = self._batch.num_lanes - draft.num_lanes - len(request.lanes)
            count = prompts.chunk(request, draft.budget - unserved, islice(running, index + 1, None), self.waiting)
            chunks = draft.divide(request, count)
            if self._make_room(request, chunks, draft):
                draft.add(request, chunks)

    def _serve_decodes(self, draft: Draft) -> bool:
        """All at once where nobody has more than one token to compute and there are blocks for all, which is so in most
        steps. False: it is not, and nothing was done."""
        if self._constrained.late or self._batch.num_lanes > min(draft.budget, len(self.running)):
            return False
        scheduled: list[Scheduled] = []
        growing: list[tuple[Lane, int]] = []
        block_size, overlaps = self._kv_cache.block_size, self._limits.overlaps
        for request in self.running:
            lane = request.first
            start, known = lane.num_computed_tokens, len(lane.tokens)
            left = known - start
            if overlaps and request.num_outstanding and request.grammar is None:  # what num_awaited says
                certain = request.max_tokens - 1 - known + lane.prompt_len
                left += min(request.num_outstanding, certain) if certain > 0 else 0
            if left == 1 and request.of_prompt is None:
                if not start % block_size and start == len(lane.block_table) * block_size:
                    growing.append((lane, 1))
                scheduled.append(Scheduled(lane, start, 1, True))
            elif left:  # else it waits for what a launched step says
                return False
        if not self._kv_cache.grow(growing):
            return False
        draft.add_decodes(scheduled)
        return True

    def _make_room(self, request: Request, chunks: list[tuple[Lane, int]], draft: Draft) -> bool:
        """Blocks for these tokens, if need be by preempting others. False if `request` itself went."""
        while not self._kv_cache.grow(chunks):
            victim = next(self._shares().beyond(request.account), self.running[-1])
            self._batch.preempt(victim, draft)
            if victim is request:
                return False
        return True

    def _shares(self) -> Shares:
        return Shares(self.running, self._at_work, self._limits.max_running, self._kv_cache)

    def _spend_the_rest(self, draft: Draft) -> None:
        """Long prompts take what they left for others and nobody took."""
        for request in tuple(draft.cut):
            if request not in draft or draft.budget == 0:  # it may have given way
                continue
            chunks = draft.divide(request, draft.num_tokens(request) + draft.budget)
            if self._kv_cache.grow(chunks):
                draft.drop(request)
                draft.add(request, chunks)

    # -- what comes of it -----------------------------------------------------------

    def advance(self, plan: Plan) -> None:
        """The plan was launched: what follows may count on its tokens."""
        overlaps = self._limits.overlaps
        for lane, start, num_tokens, samples in plan:
            if start < lane.prompt_len:
                self._counters.charge_prompt(lane, num_tokens)
            lane.num_computed_tokens += num_tokens
            if samples:
                lane.request.num_outstanding += 1
                lane.request.goes_ahead = overlaps

    def record(self, plan: Plan, outputs: Mapping[Lane, Output]) -> list[TokenEvent]:
        """What came of a plan that was advanced. `outputs` has every lane that samples.

        Requests may have ended meanwhile; nothing is said of those.
        """
        events: list[TokenEvent] = []
        late, block_size = self._constrained.late_among(outputs), self._kv_cache.block_size
        for lane, start, num_tokens, _ in plan:
            end = start + num_tokens
            # one that gave way meanwhile and runs again has not come so far yet, or has computed it anew
            if (
                end // block_size > lane.num_committed_blocks  # looked at for every lane: mostly no block is full
                and lane.request.status is Status.RUNNING
                and lane.num_computed_tokens >= end
            ):
                # what will be computed again is nobody else's to read yet
                self._kv_cache.commit(lane, end - (lane.request in late))
        for lane, _, _, samples in plan:
            request = lane.request
            if samples and request.status is not Status.FINISHED:
                request.num_outstanding -= 1
                self._take(request, outputs[lane], events)
        return events

    def _take(self, request: Request, output: Output, events: list[TokenEvent]) -> None:
        """The output of one of its steps; adds to `events`."""
        if output.error is not None:
            fault = self._soundness.failed(request) if output.is_not_finite else None
            events.append(self._finish(request, FinishReason.ERROR, output.error, fault=fault))
            return
        if output.is_late:
            self._constrained.was_late(request, output.of_prompt)
            return
        if request.max_tokens == 0:
            events.append(self._finish(request, FinishReason.LENGTH, told=output.of_prompt))
            return
        assert output.tokens, "a request that wants tokens gets at least one, or an error"
        told = output.of_prompt or request.told_early
        self._counters.charge_generated(request, len(output.tokens))
        for token in output.tokens:
            is_first = len(request.first.tokens) == request.first.prompt_len
            reason = request.append(token.id)
            if reason is not None:
                events.append(self._finish(request, reason, token=token, told=told))
                return
            events.append(_event(request, token, told=told) if is_first else TokenEvent(request.id, token))
            told = request.told_early = None
            if request.grammar is not None:
                self._constrained.took(request, token.id)

    # -- ends -----------------------------------------------------------

    def _fail(self, failure: AdapterFailed) -> None:
        """End all that wait for the adapter."""
        together = [it for it in self.waiting if failure.ref in it.adapters]
        self._failed += [
            self._finish(it, FinishReason.ERROR, worded(failure, it), fault=failure.fault) for it in together
        ]

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        error: str | None = None,
        token: Token | None = None,
        told: ToldOfPrompt | None = None,
        fault: Fault | None = None,
    ) -> TokenEvent:
        if request.status is Status.RUNNING:
            self._batch.stop(request)
        else:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        del self._requests[request.id]
        if self._at_work.remove(request):
            self._counters.leave(request.account)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._soundness.ended_well(request)
        self._adapters.let_go(request)
        return _event(request, token, reason, error, told, fault)

    def check(self) -> None:
        """Every invariant of the engine, recomputed."""
        waiting = {request.id for request in self.waiting}
        assert {request.id for request in self.running} | waiting == set(self._requests)
        assert not {request.id for request in self.running} & waiting
        self._batch.check(self._limits.max_running)
        assert all(request.status is Status.WAITING for request in self.waiting)
        assert not any(self._kv_cache.num_held_blocks(request) for request in self.waiting)
        self._at_work.check(self._requests.values())
        self._counters.check(self._at_work.weights.keys())
        self.waiting.check()
        assert all(it.num_uncomputed_tokens > 0 or it.num_outstanding for it in self._requests.values())
        assert all(0 <= it.num_outstanding <= self._limits.overlaps for it in self._requests.values())
        self._kv_cache.check(self._requests.values())
        self._adapters.check(self._requests.values())
        self._constrained.check(self.running)
        self._residency.check()


def _event(
    request: Request,
    token: Token | None,
    finish: FinishReason | None = None,
    error: str | None = None,
    told: ToldOfPrompt | None = None,
    fault: Fault | None = None,
) -> TokenEvent:
    is_first = request.num_generated < 2
    cached, queued_s = (request.num_cached_tokens, request.queued_s) if is_first else (0, 0.0)
    return TokenEvent(request.id, token, finish, error, cached, told, fault, queued_s)
