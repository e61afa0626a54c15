"""The requests that run, and what each holds: a place for each lane, KV blocks, pins of its adapters, masks."""

from collections.abc import Sequence

from server.engine.constrained import Constrained
from server.engine.kv_cache import KVCache
from server.engine.pins import unpin
from server.engine.plan import Draft
from server.engine.queue import WaitingQueue
from server.engine.request import BASE_SLOT, Request, Slot, Status
from server.engine.residency import Residency


class Batch:
    def __init__(
        self, waiting: WaitingQueue, kv_cache: KVCache, residency: Residency, constrained: Constrained
    ) -> None:
        self._waiting, self._kv_cache, self._residency = waiting, kv_cache, residency
        self._constrained = constrained
        self.running: list[Request] = []  # in order of admission
        self.num_lanes = 0
        self.num_preemptions = 0

    def start(self, request: Request, slots: Sequence[Slot]) -> None:
        """One that waits, and whose adapters are pinned."""
        self._waiting.remove(request)
        self.running.append(request)
        self.num_lanes += len(request.lanes)
        request.status = Status.RUNNING
        for lane, slot in zip(request.lanes, slots, strict=True):
            lane.slot = slot
        self._constrained.start(request)

    def stop(self, request: Request) -> None:
        """Give back place, blocks and pins."""
        self.running.remove(request)
        self.num_lanes -= len(request.lanes)
        self._kv_cache.release(request)
        unpin(self._residency, request.adapters)
        self._constrained.stop(request)
        for lane in request.lanes:
            lane.slot = BASE_SLOT

    def preempt(self, victim: Request, draft: Draft) -> None:
        draft.drop(victim)
        self.stop(victim)
        victim.status = Status.WAITING
        self._waiting.push_front(victim)
        self.num_preemptions += 1

    def check(self, max_lanes: int) -> None:
        assert self.num_lanes == sum(len(request.lanes) for request in self.running) <= max_lanes
        assert all(request.status is Status.RUNNING for request in self.running)
