"""The engine without a model, for tests of single promises."""

from collections import Counter

from adapters_store.ref import AdapterRef
from server.engine.fake_masks import FakeMasks
from server.engine.fake_runner import FakeResidency, FakeRunner
from server.engine.kv_cache import KVCache
from server.engine.request import Status
from server.engine.scheduler import SchedulerLimits
from tests.support.driver import Answer, Driver

BLOCK = 4


class FakeEngine(Driver):
    """An engine without a model; adapters are ready as soon as they are wanted."""

    def __init__(self, blocks: int = 50, slots: int = 2, residency: FakeResidency | None = None,
                 runner: FakeRunner | None = None, masks: FakeMasks | None = None, **limits: int) -> None:  # fmt: skip
        defaults = {"tokens_per_step": 16, "max_running": 8, "max_waiting": 100, "max_skips": 5}
        super().__init__(SchedulerLimits(**{**defaults, **limits}), KVCache(blocks, BLOCK),
                         runner or FakeRunner(blocks, BLOCK), residency or FakeResidency(slots),
                         masks=masks)  # fmt: skip

    def adapter(self, name: str, revision: str | None = None, pinned: bool = False) -> AdapterRef:
        return self.register(AdapterRef(name, revision or name, "lora"), pinned=pinned)

    def computed(self) -> dict[int, int]:
        """Make a step; tokens computed by request."""
        counts: Counter[int] = Counter()
        for scheduled in self.step():
            counts[scheduled.lane.request.id] += scheduled.num_tokens
        return dict(counts)

    def run(self, steps: int = 200) -> None:
        for _ in range(steps):
            self.step()

    def is_running(self, answer: Answer) -> bool:
        request = self.request(answer)
        return request is not None and request.status is Status.RUNNING
