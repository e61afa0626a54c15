"""The real engine in the test's own process: scheduler, caches, runner and residency, without HTTP or processes."""

import random
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from adapters_store.rules import Adapter
from server.assembly import assemble
from server.config import EngineConfig
from server.device import CPU
from server.engine.core import Pace
from server.engine.fake_masks import FakeMasks
from server.engine.masks import Masks
from tests.support.driver import GREEDY, Answer, Driver
from tests.support.stepped_residency import wait_until_resident

__all__ = ["GREEDY", "Answer", "Engine", "prompts"]


def prompts(count: int = 5, vocab: int = 199, seed: int = 7, longest: int = 33) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [1, longest, *(rng.randrange(2, longest) for _ in range(count - 2))]
    return [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths[:count]]


class Engine(Driver):
    """Small on purpose: blocks of 4 tokens and a budget of 24, so that every prompt is cut and requests mix.
    Matrices are packed, as those of real models mostly are: what is this small would not be."""

    def __init__(
        self, model: nn.Module, device: torch.device = CPU, masks: Masks | None = None, **settings: object
    ) -> None:
        defaults = dict(model_dir=".", block_size=4, tokens_per_step=24, max_running=8, kv_cache_bytes=1 << 22,
                        adapter_bytes=1 << 26, adapter_slots=4, linear_form="onednn-packed",
                        self_check=False)  # fmt: skip
        config = EngineConfig(**{**defaults, **settings})  # type: ignore[arg-type]
        self.assembly = assemble(model, config, frozenset(), masks or FakeMasks(), device=device)
        it = self.assembly
        super().__init__(it.limits, it.kv_cache, it.runner, it.residency, it.checker, it.masks)
        self.slots_of_steps: list[set[int]] = []  # adapter slots of each

    def register(self, ref: AdapterRef, package: AdapterPackage | None = None, pinned: bool = False) -> AdapterRef:
        super().register(ref, package, pinned)
        self._deliver()
        return ref

    def remove(self, ref: AdapterRef) -> None:
        super().remove(ref)
        self._deliver()

    def bring_in(self, entries: Sequence[Adapter]) -> None:
        """Onto the device, all of them at once. Threads load, so it is chance which steps requests share that have to
        wait for it."""
        for entry in entries:
            wait_until_resident(self.residency, entry)
        for entry in entries:
            self.residency.release(entry.ref)

    def _deliver(self) -> None:
        """At once where there is nothing to compute: tests look at the device then."""
        if not self.scheduler.has_requests:
            self.step()

    def run(self, between: Callable[[int], None] = lambda _: None, max_steps: int = 5000) -> None:
        """Step until every request has ended; `between` is called with the step's number before each."""
        for number in range(max_steps):
            between(number)
            if self.is_done:
                return
            self.slots_of_steps.append({scheduled.lane.slot for scheduled in self.step()})
            if self.engine.pace is Pace.LOADING:
                time.sleep(0.001)
        raise AssertionError("the engine did not finish")
