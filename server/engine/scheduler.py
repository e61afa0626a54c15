"""Continuous batching: each step, which lanes compute how many tokens.

One rule covers chunked prefill, prefix reuse and preemption: a step hands out tokens so that every lane's
`num_computed_tokens` catches up with its tokens, under a budget (step_budget.py). Requests that run are served first
(prompts.py); then waiting ones are admitted, group by group in turn (queue.py), and a group that holds more than its
share gives way (shares.py). The scheduler does no I/O and knows no clock.

    schedule() -> plan      which tokens
    advance(plan)           they are being computed: the next plan may count on them
    record(plan, outputs)   what came of them
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from server.engine import prompts
from server.engine.adapter_users import AdapterUsers
from server.engine.kv_cache import KVCache
from server.engine.messages import TokenEvent
from server.engine.pins import Pins, is_held_back, starved, unpin, worded
from server.engine.plan import LOGITS_PER_STEP, Draft, Output, Plan, Scheduled
from server.engine.queue import WaitingQueue
from server.engine.request import BASE_SLOT, FinishReason, Group, Lane, Request, Slot, Status, Token, ToldOfPrompt
from server.engine.residency import AdapterFailed, Residency, Wait
from server.engine.shares import Shares
from server.engine.step_budget import StepBudget


class CannotServe(Exception):
    """The request is refused at the door; the message carries the numbers."""


@dataclass(frozen=True)
class SchedulerLimits:
    tokens_per_step: int
    max_running: int  # lanes
    max_waiting: int
    max_skips: int  # see pins.is_held_back
    logits_per_step: int = LOGITS_PER_STEP  # see Draft
    vocab_size: int = 1 << 31  # what prompts are made of
    target_inter_token_s: float = 0.0  # see StepBudget


class Scheduler:
    def __init__(
        self,
        limits: SchedulerLimits,
        kv_cache: KVCache,
        residency: Residency,
        adapters: AdapterUsers,
        step_budget: StepBudget,
    ) -> None:
        self._limits = limits
        self._step_budget = step_budget
        self._kv_cache = kv_cache
        self._residency = residency
        self._adapters = adapters
        self._requests: dict[int, Request] = {}
        self._group_sizes: Counter[Group] = Counter()  # unfinished requests
        self.waiting = WaitingQueue()
        self.running: list[Request] = []  # in order of admission
        self._num_running_lanes = 0
        self.num_preemptions = 0
        self._num_lacking = 0  # requests that waited, in the last step, for adapters to come to the device
        self._is_walled = False  # whether, in the last step, one waited for blocks

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
        self._group_sizes[request.group] += 1
        self.waiting.push(request)

    def _require_room(self, request: Request) -> None:
        """Raises CannotServe."""
        num_lanes, needed = len(request.lanes), self._kv_cache.max_blocks(request)
        if needed > self._kv_cache.pool.num_blocks:
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
    def lacks_adapters(self) -> bool:
        """Whether, in the last step, a request waited for adapters to come to the device."""
        return self._num_lacking > 0

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    # -- one step -----------------------------------------------------------

    def schedule(self) -> tuple[list[Scheduled], list[TokenEvent]]:
        """The tokens of the next step, and requests that ended instead because their adapter failed to load."""
        self._residency.poll()
        draft = Draft(self._budget(), self._limits.logits_per_step)
        self._num_lacking = 0
        preemptions = self.num_preemptions
        self._serve_running(draft)
        is_short = self._is_walled = self.num_preemptions > preemptions
        failed = self._admit(draft, is_short)
        self._spend_the_rest(draft)
        return draft.plan, failed

    def _budget(self) -> int:
        """Tokens of this step: at least one for each lane that runs, and for those of who may start next."""
        if not self._step_budget.has_target:
            return self._limits.tokens_per_step
        startable = 0
        if not self._is_walled:  # else they wait for blocks, and a longer step would not bring them any
            ready = max(0, len(self.waiting) - self._num_lacking)
            startable = max(0, min(ready, self._limits.max_running - self._num_running_lanes))
        load = prompts.load(self.running, self._num_running_lanes, startable)
        starting = len(next(self.waiting.order()).lanes) if startable else 0
        least = min(self._num_running_lanes + starting, self._limits.tokens_per_step)
        return max(least, self._step_budget.tokens(load))

    def _serve_running(self, draft: Draft) -> None:
        """At least one token for each lane that runs."""
        running = prompts.in_turn(self.running)
        for index, request in enumerate(running):
            if request.status is not Status.RUNNING or not request.num_uncomputed_tokens:
                continue  # it gave way to an older one, or waits for what a launched step says
            unserved = self._num_running_lanes - draft.num_lanes - len(request.lanes)
            count = prompts.chunk(request, draft.budget - unserved, islice(running, index + 1, None), self.waiting)
            chunks = draft.divide(request, count)
            if self._make_room(request, chunks, draft):
                draft.add(request, chunks)

    def _make_room(self, request: Request, chunks: list[tuple[Lane, int]], draft: Draft) -> bool:
        """Blocks for these tokens, if need be by preempting others. False if `request` itself went."""
        while not self._kv_cache.grow(chunks):
            victim = next(self._shares().beyond(), self.running[-1])
            self._preempt(victim, draft)
            if victim is request:
                return False
        return True

    def _preempt(self, victim: Request, draft: Draft) -> None:
        draft.drop(victim)
        self._stop_running(victim)
        victim.status = Status.WAITING
        self.waiting.push_front(victim)
        self.num_preemptions += 1

    def _shares(self) -> Shares:
        return Shares(self.running, len(self._group_sizes), self._limits.max_running, self._kv_cache)

    def _admit(self, draft: Draft, is_short: bool) -> list[TokenEvent]:
        """Start waiting requests, in order, as long as budget, places and blocks last; adds to `draft`.

        `is_short`: a request that ran was preempted for want of blocks in this step. To admit more would only preempt
        again, unless it is at the cost of a group that holds more than its share.
        """
        failed: list[TokenEvent] = []
        if not self.waiting:
            return failed
        shares = self._shares()
        if not self._is_open(draft, is_short) and not any(shares.beyond()):
            return failed
        starving, is_walled = starved(self.waiting, self.running, self._limits.max_skips), False
        pins = Pins(self._residency)
        for request in self._candidates(shares):
            may_displace = not shares.is_used_up(request.group)
            if not self._is_open(draft, is_short) and not (may_displace and any(shares.beyond())):
                break
            if is_held_back(request, starving) or (is_walled and not shares.lets_pass(request)):
                continue
            try:
                slots = pins.pin(request)
            except AdapterFailed as error:
                together = [it for it in self.waiting if error.ref in it.adapters]
                failed += [self._finish(it, FinishReason.ERROR, worded(error, it)) for it in together]
                continue
            if isinstance(slots, Wait):  # passed over, never a wall: those behind it may run
                request.num_skips += slots is Wait.NO_ROOM
                self._num_lacking += 1
                if starving is None and len(set(request.adapters)) > 1:
                    starving = request  # else two such requests evict each other's adapters before all of one are there
                continue
            if not self._start(request, slots, draft, shares):
                is_walled = self._is_walled = (
                    True  # first come, first served for blocks: else a large request would wait for ever
                )
                request.num_passes += 1
                if request.num_passes > self._limits.max_skips:
                    break
        return failed

    def _is_open(self, draft: Draft, is_short: bool) -> bool:
        """Whether a request may start without taking anything from another."""
        return draft.budget > 0 and self._num_running_lanes < self._limits.max_running and not is_short

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

    def _start(self, request: Request, slots: list[Slot], draft: Draft, shares: Shares) -> bool:
        """Let a pinned request run, in the place and the blocks of others where they have more than their share.

        Blocks for all its tokens must be there, not only for those of this step: prompts that are begun and cannot be
        ended hold blocks for nothing, until they are preempted.
        """
        self._kv_cache.attach_prefix(request)
        if not self._make_way(request, draft, shares):
            self._kv_cache.release(request)
            unpin(self._residency, request.adapters)
            return False
        chunks = draft.divide(request, draft.budget)
        has_grown = self._kv_cache.grow(chunks)
        assert has_grown
        if not request.was_admitted:
            self._kv_cache.count_prefix(request)
            request.was_admitted = True
        self.waiting.charge(request.group)
        self.waiting.remove(request)
        self.running.append(request)
        self._num_running_lanes += len(request.lanes)
        request.status = Status.RUNNING
        for lane, slot in zip(request.lanes, slots, strict=True):
            lane.slot = slot
        request.num_skips = request.num_passes = 0
        shares.take(request)
        draft.add(request, chunks)
        return True

    def _make_way(self, request: Request, draft: Draft, shares: Shares) -> bool:
        """Blocks, and for each lane a place and a token of the budget, if need be out of what others hold beyond their
        share. Nothing is taken where it would not be enough, nor for a group that would then be beyond its own."""
        num_lanes = len(request.lanes)
        missing = self._kv_cache.num_missing_blocks(request)
        lacks_blocks = missing - shares.num_free_blocks
        lacks_places = self._num_running_lanes + num_lanes - self._limits.max_running
        lacks_tokens = num_lanes - draft.budget
        victims: list[Request] = []
        for victim in shares.beyond() if shares.has_room_for(request, missing) else ():
            if max(lacks_blocks, lacks_places, lacks_tokens) <= 0:
                break
            victims.append(victim)
            lacks_blocks -= shares.num_blocks_of(victim)
            lacks_places -= len(victim.lanes)
            lacks_tokens -= draft.num_tokens(victim)
        if max(lacks_blocks, lacks_places, lacks_tokens) > 0:
            return False
        for victim in victims:
            shares.give_back(victim)
            self._preempt(victim, draft)
        return missing <= shares.num_free_blocks  # blocks that victims share with others are not free yet

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
        for scheduled in plan:
            scheduled.lane.num_computed_tokens += scheduled.num_tokens

    def record(self, plan: Plan, outputs: Mapping[Lane, Output]) -> list[TokenEvent]:
        """What came of a plan that was advanced. `outputs` has every lane that samples.

        Requests may have ended meanwhile; nothing is said of those.
        """
        events: list[TokenEvent] = []
        for lane, start, num_tokens, _ in plan:
            # one that gave way meanwhile and runs again has not come so far yet, or has computed it anew
            if lane.request.status is Status.RUNNING and lane.num_computed_tokens >= start + num_tokens:
                self._kv_cache.commit(lane, start + num_tokens)
        for lane, _, _, samples in plan:
            if samples and lane.request.status is not Status.FINISHED:
                self._take(lane.request, outputs[lane], events)
        return events

    def _take(self, request: Request, output: Output, events: list[TokenEvent]) -> None:
        """The output of one of its steps; adds to `events`."""
        if output.error is not None:
            events.append(self._finish(request, FinishReason.ERROR, output.error))
            return
        if request.max_tokens == 0:
            events.append(self._finish(request, FinishReason.LENGTH, told=output.of_prompt))
            return
        assert output.tokens, "a request that wants tokens gets at least one, or an error"
        told = output.of_prompt
        for token in output.tokens:
            reason = request.append(token.id)
            if reason is not None:
                events.append(self._finish(request, reason, token=token, told=told))
                return
            events.append(_event(request, token, told=told))
            told = None

    # -- ends -----------------------------------------------------------

    def _stop_running(self, request: Request) -> None:
        """Give back place, blocks and pins."""
        self.running.remove(request)
        self._num_running_lanes -= len(request.lanes)
        self._kv_cache.release(request)
        unpin(self._residency, request.adapters)
        for lane in request.lanes:
            lane.slot = BASE_SLOT

    def _finish(
        self,
        request: Request,
        reason: FinishReason,
        error: str | None = None,
        token: Token | None = None,
        told: ToldOfPrompt | None = None,
    ) -> TokenEvent:
        if request.status is Status.RUNNING:
            self._stop_running(request)
        else:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        del self._requests[request.id]
        self._group_sizes[request.group] -= 1
        if not self._group_sizes[request.group]:
            del self._group_sizes[request.group]
        self._adapters.let_go(request)
        return _event(request, token, reason, error, told)

    def check(self) -> None:
        """Every invariant of the engine, recomputed."""
        waiting = {request.id for request in self.waiting}
        assert {request.id for request in self.running} | waiting == set(self._requests)
        assert not {request.id for request in self.running} & waiting
        assert self._num_running_lanes == sum(len(request.lanes) for request in self.running)
        assert self._num_running_lanes <= self._limits.max_running
        assert all(request.status is Status.RUNNING for request in self.running)
        assert all(request.status is Status.WAITING for request in self.waiting)
        assert not any(self._kv_cache.num_held_blocks(request) for request in self.waiting)
        assert self._group_sizes == Counter(request.group for request in self._requests.values())
        self.waiting.check()
        assert all(request.num_uncomputed_tokens > 0 for request in self._requests.values())
        self._kv_cache.check(self._requests.values())
        self._adapters.check(self._requests.values())
        self._residency.check()


def _event(
    request: Request,
    token: Token | None,
    finish: FinishReason | None = None,
    error: str | None = None,
    told: ToldOfPrompt | None = None,
) -> TokenEvent:
    cached = request.num_cached_tokens if request.num_generated < 2 else 0
    return TokenEvent(request.id, token, finish, error, cached, told)
