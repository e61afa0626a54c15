"""The real engine in the test's own process: scheduler, caches, runner and residency, without HTTP or messages."""

import random
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from adapters_store.ref import AdapterRef
from server.assembly import assemble
from server.config import EngineConfig
from server.device import CPU
from server.engine.adapter_users import AdapterUsers
from server.engine.request import Request, Sampling
from server.engine.scheduler import Emitted, Scheduler

GREEDY = Sampling(temperature=0.0)


def prompts(count: int = 5, vocab: int = 199, seed: int = 7, longest: int = 33) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [1, longest, *(rng.randrange(2, longest) for _ in range(count - 2))]
    return [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths[:count]]


class Engine:
    """Small on purpose: blocks of 4 tokens and a budget of 24, so that every prompt is cut and requests mix."""

    def __init__(self, model: nn.Module, device: torch.device = CPU, **settings: object) -> None:  # fmt: skip
        defaults = dict(model_dir=".", block_size=4, tokens_per_step=24, max_running=8, kv_cache_bytes=1 << 22,
                        adapter_bytes=1 << 26, adapter_slots=4)  # fmt: skip
        config = EngineConfig(**{**defaults, **settings})  # type: ignore[arg-type]
        self.assembly = assemble(model, config, frozenset(), device=device)
        self.residency = self.assembly.residency
        self.adapters = AdapterUsers(self.residency)
        self.scheduler = Scheduler(self.assembly.limits, self.assembly.kv_cache, self.residency, self.adapters)
        self.requests: list[Request] = []
        self.ended: dict[int, Emitted] = {}
        self.batch_slots: list[set[int]] = []  # adapter slots of each step

    def add(self, prompt: Sequence[int], max_tokens: int, adapter: AdapterRef | None = None,
            sampling: Sampling = GREEDY) -> Request:  # fmt: skip
        request = Request(len(self.requests), list(prompt), max_tokens, sampling, adapter)
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        plan, failed = self.scheduler.schedule()
        self.batch_slots.append({scheduled.request.slot for scheduled in plan})
        sampled = self.assembly.runner.run(plan) if plan else {}
        for emitted in failed + self.scheduler.update(plan, sampled):
            if emitted.finish is not None:
                self.ended[emitted.request.id] = emitted
        if not plan:
            time.sleep(0.001)  # waiting for a transfer
        self.scheduler.check()

    def run(self, between: Callable[[int], None] = lambda _: None, max_steps: int = 5000) -> None:
        """Step until every request has ended; `between` is called with the step's number before each."""
        for number in range(max_steps):
            between(number)
            if not self.scheduler.has_requests:
                return
            self.step()
        raise AssertionError("the engine did not finish")


def generated(request: Request) -> list[int]:
    return request.tokens[request.prompt_len :]
