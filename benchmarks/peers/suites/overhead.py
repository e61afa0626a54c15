"""What Heddle does beside computing: the engine's CPU time a step with nothing to compute, the front's a streamed
token.

The engine decodes over a runner that answers at once, whose own time is taken off. In an engine with n
adapters, running requests name them in turns.
"""

import tempfile
import time
from pathlib import Path

import psutil

from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from benchmarks.front import ROUTES, cost_us, make_model
from benchmarks.peers.correctness import counted
from benchmarks.peers.load import Sample, Taken
from benchmarks.peers.rounds import Plan, say
from benchmarks.served import Heddle, OtherWork
from server.engine.core import Engine
from server.engine.fake_masks import FakeMasks
from server.engine.fake_runner import FakeChecker, FakeResidency, Known
from server.engine.kv_cache import KVCache
from server.engine.messages import AddAdapter, AddRequest
from server.engine.plan import Output
from server.engine.plan import Plan as StepPlan
from server.engine.request import LaneSpec, Sampling, Token
from server.engine.scheduler import SchedulerLimits

TITLE = "engine and front without a model"
RUNNING, ADAPTERS = (1, 8, 64, 512), (1, 8, 64, 1000)
STEP, TOKEN = "us a step", "us a token"
_PROMPT, _BLOCK = 16, 16


class Instant:
    """A runner that always answers the same token. `seconds`: its own CPU time."""

    seconds = 0.0

    def launch(self, plan: StepPlan) -> Known:
        start = time.thread_time()
        told = Known({it.lane: Output((Token(7),)) for it in plan if it.samples})
        self.seconds += time.thread_time() - start
        return told


def run(plan: Plan) -> Taken:
    taken = Taken()
    for number in range(plan.rounds):
        for running in RUNNING if not plan.quick else (1, 8):
            for adapters in ADAPTERS if not plan.quick else (1, 8):
                _engine(taken, number, running, adapters, plan.size(100, 20))
    streams, tokens = plan.size(500, 20), plan.size(100, 20)
    with tempfile.TemporaryDirectory() as made:
        make_model(Path(made))
        server = Heddle(Path(made), options=["--threads", "1", "--max-running", str(streams)])
        try:
            for number in range(plan.rounds):
                for route in ROUTES:
                    with OtherWork() as others:
                        cost = cost_us(
                            server.front, server.port, route, streams, tokens
                        )  # raises where events are missing
                    foreign = round(others.share * (psutil.cpu_count() or 1), 2)
                    mode = f"front, {route}"
                    taken.samples.append(Sample("heddle", mode, number, {TOKEN: cost}, foreign))
                    say(f"  round {number} {mode}: {cost:.1f} us a token")
                    taken.checks = [it for it in taken.checks if it.mode != mode]
                    taken.checks.append(counted("heddle", mode, streams * (tokens + 1), streams * (tokens + 1)))
        finally:
            server.stop()
    return taken


def _engine(taken: Taken, number: int, running: int, adapters: int, steps: int) -> None:
    limits = SchedulerLimits(tokens_per_step=1 << 16, max_running=running, max_waiting=running, max_skips=10)
    tokens = _PROMPT + steps + 4
    runner = Instant()
    cache = KVCache(running * (tokens // _BLOCK + 2), _BLOCK)
    engine = Engine(limits, cache, runner, FakeResidency(adapters), FakeChecker(), FakeMasks())
    refs = [AdapterRef(f"a{index}", f"revision {index}", "lora") for index in range(adapters)]
    engine.step([AddAdapter(it, AdapterPackage("lora", it.revision, (), ())) for it in refs])
    engine.step([
        AddRequest(index, index, [LaneSpec([index % 997 + 3] * _PROMPT, refs[index % adapters])], tokens - _PROMPT,
                   Sampling(temperature=0.0), frozenset()) for index in range(running)
    ])  # fmt: skip
    engine.step([])
    runner.seconds, found = 0.0, 0
    with OtherWork() as others:
        start = time.thread_time()
        for _ in range(steps):
            found += len(engine.step([]))
        seconds = time.thread_time() - start - runner.seconds
    mode = f"engine, {running} running, {adapters:,} adapters"
    foreign = round(others.share * (psutil.cpu_count() or 1), 2)
    taken.samples.append(Sample("heddle", mode, number, {STEP: 1e6 * seconds / steps}, foreign))
    taken.checks = [it for it in taken.checks if it.mode != mode]
    taken.checks.append(counted("heddle", mode, found, running * steps))
