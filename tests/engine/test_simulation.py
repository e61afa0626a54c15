"""Long random runs of the engine without a model (tests/support/simulation.py).

`make simulate` runs a million steps; `python -m tests.engine.test_simulation --steps N --seed S` reproduces one run.
"""

import argparse
import random
import sys
import time

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from server.engine.request import FinishReason
from tests.support.breadth import always
from tests.support.simulation import Simulation, simulate


@pytest.mark.slow
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize(("steps", "seed"), always([(10_000, 0), (25_000, 1), (25_000, 2), (25_000, 3)], (10_000, 0)))
def test_a_long_random_run_breaks_no_invariant(steps: int, seed: int, overlaps: bool) -> None:
    counts = simulate(steps, seed, overlaps)
    # the run is only worth something if it went through the rare paths
    for path in (*FinishReason, "preemptions", "adapters removed", "prefix hits (tokens)", "requests of several lanes",
                 "adapters pinned", "pinned, and waiting for room", "adapters that came back", "checks",
                 "prompts told of", "prompts pooled", "prompts told of in chunks"):  # fmt: skip
        assert counts[path] > steps / 250, path
    assert (counts["tokens fed back"] > steps / 10) == overlaps
    for path in (
        "not finite",
        "quarantined",
        "ended by a quarantine",
        "prompts begun anew",
        "prompts pooled behind a prefix hit",
        "constrained",
        "late masks",
        "late masks of several lanes",
        "grammars that broke",
    ):
        assert counts[path] > steps / 2500, path
    assert counts["prompts told of, and a late mask"]  # prompts take many steps there, and masks a few


class EngineMachine(RuleBasedStateMachine):
    """The same, with Hypothesis choosing and shrinking the sequence of events."""

    @initialize(slots=st.integers(1, 3), polls=st.integers(0, 3), budget=st.integers(6, 60), overlaps=st.booleans())
    def start(self, slots: int, polls: int, budget: int, overlaps: bool) -> None:
        self.simulation = Simulation(slots, polls, budget, overlaps)

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
    def pin_or_unpin(self, seed: int) -> None:
        self.simulation.pin_or_unpin(random.Random(seed))

    @rule(seed=st.integers(0, 2**32))
    def come_back(self, seed: int) -> None:
        self.simulation.come_back(random.Random(seed))

    @rule(seed=st.integers(0, 2**32))
    def check_adapter(self, seed: int) -> None:
        self.simulation.check_adapter(random.Random(seed))

    @rule(seed=st.integers(0, 2**32))
    def turn_sick_or_well(self, seed: int) -> None:
        self.simulation.turn_sick_or_well(random.Random(seed))

    @rule(seed=st.integers(0, 2**32))
    def abort(self, seed: int) -> None:
        self.simulation.abort_one(random.Random(seed))

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()

    @invariant()
    def holds_together(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.engine.check()

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
    parser.add_argument("--overlaps", action="store_true", help="one step in flight, as on a GPU")
    options = parser.parse_args()
    start = time.perf_counter()
    counts = simulate(options.steps, options.seed, options.overlaps)
    print(f"{counts['steps']:,} steps in {time.perf_counter() - start:.0f} s, 0 invariants broken")
    for what, count in sorted(counts.items()):
        print(f"  {what:22} {count:>12,}")


if __name__ == "__main__":
    sys.exit(main())
