"""The engine without a model: random adds, steps, aborts, adapter arrivals and removals, every invariant each step.

`make simulate` runs a million steps; `python -m tests.engine.test_simulation --steps N --seed S` reproduces one run.
"""

import argparse
import random
import sys
import time
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from server.engine.adapter_users import AdapterUsers
from server.engine.fake_runner import FakeResidency, FakeRunner, expected_tokens
from server.engine.kv_cache import KVCache
from server.engine.request import FinishReason, Request, Sampling
from server.engine.scheduler import CannotServe, Emitted, Scheduler, SchedulerLimits

VOCAB = 50  # small, so that prompts share prefixes and stop tokens occur
BLOCK = 4
BLOCKS = 24


class Simulation:
    """An engine over FakeRunner, and the answers that it owes."""

    def __init__(self, slots: int = 3, polls_to_load: int = 2, tokens_per_step: int = 16) -> None:
        self.kv_cache = KVCache(BLOCKS, BLOCK)
        self.residency = FakeResidency(slots, polls_to_load)
        self.adapters = AdapterUsers(self.residency)
        limits = SchedulerLimits(tokens_per_step=tokens_per_step, max_running=6, max_waiting=30, max_skips=10)
        self.scheduler = Scheduler(limits, self.kv_cache, self.residency, self.adapters)
        self.runner = FakeRunner(BLOCKS, BLOCK, VOCAB)
        self.served: list[AdapterRef] = []
        self.live: dict[int, Request] = {}
        self.counts: Counter[str] = Counter()
        self.idle_steps = 0
        self._next_id = 0
        self._group = 0

    def add_adapter(self) -> None:
        self._next_id += 1
        # a few names, always new weights: the same name comes to mean other revisions
        ref = AdapterRef(f"adapter-{self._next_id % 4}", f"revision-{self._next_id}", "lora")
        self.adapters.register(ref, AdapterPackage("lora", "", ref.revision, (), ()))
        self.served.append(ref)
        self.counts["adapters added"] += 1

    def remove_adapter(self, rng: random.Random) -> None:
        if self.served:
            self.adapters.remove(self.served.pop(rng.randrange(len(self.served))))
            self.counts["adapters removed"] += 1

    def add_request(self, rng: random.Random) -> None:
        self._next_id += 1
        adapter = rng.choice([None, *self.served])
        shared = [rng.randrange(2)] * rng.randrange(16)  # common prefixes: cache hits
        prompt = shared + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 20))]
        stops = frozenset(rng.sample(range(VOCAB), rng.randrange(3)))
        max_tokens = rng.randrange(1, 90)
        if rng.random() < 0.4:  # else it is one more of the last group
            self._group = self._next_id
        request = Request(self._next_id, prompt, max_tokens, Sampling(), adapter, stops, self._group)
        try:
            self.scheduler.add(request)
        except CannotServe:
            assert request.max_len > BLOCKS * BLOCK or len(self.scheduler.waiting) >= 30  # preempted ones wait too
            self.counts["refused"] += 1
        else:
            self.live[request.id] = request
            self.counts["requests"] += 1

    def abort(self, rng: random.Random) -> None:
        if self.live:
            ended = self.scheduler.abort(rng.choice(list(self.live)))
            assert ended is not None and ended.finish is FinishReason.ABORT
            del self.live[ended.request.id]
            self.counts["aborts"] += 1

    def step(self) -> None:
        plan, failed = self.scheduler.schedule()
        assert not failed
        for emitted in self.scheduler.update(plan, self.runner.run(plan)):
            self._verify(emitted)
        self.counts["steps"] += 1
        self.counts["tokens"] += sum(scheduled.num_tokens for scheduled in plan)
        # progress: an engine with requests may wait for a transfer, but not for ever
        self.idle_steps = 0 if plan or not self.live else self.idle_steps + 1
        assert self.idle_steps < 50
        self.scheduler.check()

    def _verify(self, emitted: Emitted) -> None:
        request = emitted.request
        if emitted.finish is not None:
            del self.live[request.id]
            self.counts["finished"] += 1
            generated = request.tokens[request.prompt_len :]
            prompt = request.tokens[: request.prompt_len]
            assert generated == expected_tokens(request.adapter, prompt, len(generated), VOCAB)
            assert not request.stop_token_ids & set(generated[:-1])
            if emitted.finish is FinishReason.LENGTH:
                assert len(generated) == request.max_tokens
            else:
                assert generated[-1] in request.stop_token_ids

    def drain(self) -> None:
        """Every request that is left must come to its end, and give everything back."""
        for _ in range(20_000):
            if not self.live:
                break
            self.step()
        assert not self.live and not self.scheduler.has_requests
        assert self.kv_cache.pool.num_free == BLOCKS


def simulate(steps: int, seed: int) -> Counter[str]:
    rng = random.Random(seed)
    simulation = Simulation()
    for _ in range(steps):
        match rng.random():
            case x if x < 0.22:
                simulation.add_request(rng)
            case x if x < 0.25:
                simulation.abort(rng)
            case x if x < 0.27:
                simulation.add_adapter()
            case x if x < 0.29:
                simulation.remove_adapter(rng)
        simulation.step()
    simulation.drain()
    simulation.counts["preemptions"] = simulation.scheduler.num_preemptions
    simulation.counts["prefix hits (tokens)"] = simulation.kv_cache.num_prefix_hits
    return simulation.counts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_a_long_random_run_breaks_no_invariant(seed: int) -> None:
    counts = simulate(steps=25_000, seed=seed)
    # the run is only worth something if it went through the rare paths
    for path in ("finished", "aborts", "preemptions", "adapters removed", "prefix hits (tokens)", "refused"):
        assert counts[path] > 100, path


class EngineMachine(RuleBasedStateMachine):
    """The same, with Hypothesis choosing and shrinking the sequence of events."""

    @initialize(slots=st.integers(1, 3), polls=st.integers(0, 3), budget=st.integers(6, 20))
    def start(self, slots: int, polls: int, budget: int) -> None:
        self.simulation = Simulation(slots, polls, budget)

    @rule(seed=st.integers(0, 2**32))
    def add_request(self, seed: int) -> None:
        self.simulation.add_request(random.Random(seed))

    @rule()
    def add_adapter(self) -> None:
        self.simulation.add_adapter()

    @rule(seed=st.integers(0, 2**32))
    def remove_adapter(self, seed: int) -> None:
        self.simulation.remove_adapter(random.Random(seed))

    @rule(seed=st.integers(0, 2**32))
    def abort(self, seed: int) -> None:
        self.simulation.abort(random.Random(seed))

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()

    @invariant()
    def holds_together(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.scheduler.check()

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate the engine and check every invariant after every step.")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    counts = simulate(options.steps, options.seed)
    print(f"{counts['steps']:,} steps in {time.perf_counter() - start:.0f} s, 0 invariants broken")
    for what, count in sorted(counts.items()):
        print(f"  {what:22} {count:>12,}")


if __name__ == "__main__":
    sys.exit(main())
