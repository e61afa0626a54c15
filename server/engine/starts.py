"""Which of the waiting requests start in a step, and at whose expense."""

from collections.abc import Callable, Collection, Iterator

from adapters_store.ref import AdapterRef
from server.engine.batch import Batch
from server.engine.kv_cache import KVCache
from server.engine.lines import Line
from server.engine.pins import Pins, Starvation, unpin
from server.engine.plan import Draft
from server.engine.queue import WaitingQueue
from server.engine.request import Group, Request, Slot, Status
from server.engine.residency import AdapterFailed, Residency, Wait
from server.engine.shares import Shares
from server.engine.token_counters import TokenCounters

MOST_PREFETCHED = 16  # adapters


class Starts:
    """Waiting requests start in order, as long as budget, places and blocks last. `num_lacking` and `is_walled` say of
    the last step how many requests were found to wait for adapters, and whether one waited for blocks."""

    def __init__(
        self, max_running: int, max_skips: int, waiting: WaitingQueue, batch: Batch, counters: TokenCounters,
        kv_cache: KVCache, residency: Residency, fail: Callable[[AdapterFailed], None],
    ) -> None:  # fmt: skip
        """fail: ends all requests that wait for the adapter."""
        self._max_running, self._max_skips = max_running, max_skips
        self._waiting, self._batch, self._counters = waiting, batch, counters
        self._kv_cache, self._residency, self._fail = kv_cache, residency, fail
        self._starvation = Starvation(residency, max_skips)
        self._prefetched: tuple[int, list[AdapterRef]] = (-1, [])  # as of so many changes of the queue
        self._passed_over: set[Line] = set()
        self.num_lacking, self.is_walled = 0, False

    def admit(self, draft: Draft, shares: Shares, is_short: bool, now: float) -> None:
        """Adds to `draft`.

        `is_short`: a request that ran was preempted for want of blocks in this step. To admit more would only preempt
        again, unless it is at the cost of somebody who holds more than their share.
        """
        self.num_lacking, self.is_walled = 0, is_short
        self._passed_over.clear()
        if not (self._is_open(draft, is_short) or shares.has_victims):
            return
        self._starvation.look(self._waiting, self._batch.running)
        pins, is_walled = Pins(self._residency), False
        for request in self._candidates(shares):
            if not self._is_open(draft, is_short):
                if not shares.has_victims:
                    break
                priority = self._waiting.priority(request)
                if not any(shares.victims(request, 0, priority)):
                    if not shares.may_take(request.account, priority):
                        self._passed_over.add(self._waiting.line(request))
                    continue
            if request.num_outstanding or (is_walled and not shares.lets_pass(request)):
                continue  # it gave way with a step in flight, and what that chooses comes first
            slots = self._pinned(request, pins)
            if slots is None or self._start(request, slots, draft, shares, now):
                continue
            # first come, first served for blocks: else a large request would wait for ever
            is_walled = self.is_walled = True
            request.num_passes += 1
            if request.num_passes > self._max_skips:
                break

    def prefetch(self) -> None:
        """Bring nearer what those who are next wait for."""
        if not self._waiting or self._starvation.first:  # the room is theirs
            return
        if self._prefetched[0] != self._waiting.num_changes:
            refs: dict[AdapterRef, None] = {}
            for line in self._waiting.lines():
                refs.update(dict.fromkeys(line.adapters))
                if len(refs) >= MOST_PREFETCHED:
                    break
            self._prefetched = self._waiting.num_changes, list(refs)[:MOST_PREFETCHED]
        if self._prefetched[1]:
            self._residency.prefetch(self._prefetched[1])

    # -- who may -----------------------------------------------------------

    def _is_open(self, draft: Draft, is_short: bool) -> bool:
        """Whether a request may start without taking anything from another."""
        return draft.budget > 0 and self._batch.num_lanes < self._max_running and not is_short

    def _candidates(self, shares: Shares) -> Iterator[Request]:
        """Who waits, in order. Those who have starved for adapter room come first, since it is there for them now.
        Then, of each priority, those who are within their shares; then groups that are, of adapters that are not, and
        last groups that are not: they have what nobody else wants."""
        seen: set[int] = set()
        for line in self._starvation.first:
            first = next(line.order(lambda group: False), None)
            if first is not None:
                seen.add(first.id)
                yield first
        for lines in self._waiting.by_level():
            turn = _Turn(self._passed_over, self._starvation, shares)
            looks = [(turn.leaves_out_all, set(lines)), (turn.leaves_out_groups, turn.later),
                     (turn.leaves_out_nobody, turn.last)]  # fmt: skip
            for leaves_out, among in looks:
                for request in self._waiting.order_of([line for line in lines if line in among], leaves_out):
                    if request.status is Status.WAITING and request.id not in seen:  # else its adapter failed
                        seen.add(request.id)
                        yield request

    def _pinned(self, request: Request, pins: Pins) -> list[Slot] | None:
        """The slots of its adapters, which are pinned. None: it must wait, as all of its line, or has ended."""
        try:
            slots = pins.pin(request)
        except AdapterFailed as error:
            self._fail(error)
            return None
        if not isinstance(slots, Wait):
            return slots
        line = self._waiting.line(request)
        self.num_lacking += len(line)
        self._starvation.lacks(line)
        self._passed_over.add(line)  # never a wall: those behind it may run
        return None

    # -- starting -----------------------------------------------------------

    def _start(self, request: Request, slots: list[Slot], draft: Draft, shares: Shares, now: float) -> bool:
        """Let a pinned request run, in the place and the blocks of others where they have more than their share.

        Blocks for all its tokens must be there, not only for those of this step: prompts that are begun and cannot be
        ended hold blocks for nothing, until they are preempted.
        """
        self._kv_cache.attach_prefix(request)
        # blocks that others give up may be fewer than they said
        if not self._make_way(request, draft, shares) or not self._kv_cache.grow(
            chunks := draft.divide(request, draft.budget)
        ):
            self._kv_cache.release(request)
            unpin(self._residency, request.adapters)
            return False
        if not request.was_admitted:
            self._kv_cache.count_prefix(request)
            request.was_admitted, request.queued_s = True, now - request.arrived
        request.num_passes = 0
        self._waiting.charge(request)
        self._batch.start(request, slots)
        shares.take(request)
        draft.add(request, chunks)
        for lane, num_tokens in chunks:
            self._counters.charge_prompt(lane, num_tokens)
        return True

    def _make_way(self, request: Request, draft: Draft, shares: Shares) -> bool:
        """Blocks, and for each lane a place and a token of the budget, if need be out of what others hold beyond their
        share. Nothing is taken where it would not be enough."""
        num_lanes = len(request.lanes)
        missing = self._kv_cache.num_missing_blocks(request)
        lacks_blocks = missing - shares.num_free_blocks
        lacks_places = self._batch.num_lanes + num_lanes - self._max_running
        lacks_tokens = num_lanes - draft.budget
        victims: list[Request] = []
        for victim in shares.victims(request, missing, self._waiting.priority(request)):
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
            self._batch.preempt(victim, draft)
        return missing <= shares.num_free_blocks  # blocks that victims share with others are not free yet


class _Turn:
    """Which lines and groups are left out of a look through the queue, until the others have been looked at."""

    def __init__(self, passed_over: Collection[Line], starvation: Starvation, shares: Shares) -> None:
        self._passed_over, self._starvation, self._shares = passed_over, starvation, shares
        self.later: set[Line] = set()  # those whose adapter has used up its share
        self.last: set[Line] = set()  # those in which a group has

    def leaves_out_all(self, line: Line, group: Group | None) -> bool:
        if group is not None:
            return self._is_for_last(line, group)
        if self._is_passed_over(line):
            return True
        if not self._shares.is_used_up(line.account):
            return False
        self.later.add(line)
        return True

    def leaves_out_groups(self, line: Line, group: Group | None) -> bool:
        if group is not None:
            return self._is_for_last(line, group)
        return self._is_passed_over(line)

    def leaves_out_nobody(self, line: Line, group: Group | None) -> bool:
        return group is None and self._is_passed_over(line)

    def _is_passed_over(self, line: Line) -> bool:
        return line in self._passed_over or self._starvation.holds_back(line)

    def _is_for_last(self, line: Line, group: Group) -> bool:
        if not self._shares.is_used_up((line.account, group)):
            return False
        self.last.add(line)
        return True
