"""Steps of the engine itself: with the next one launched before the tokens of the last are known, and without."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.gpu.measure import Bench
from benchmarks.gpu.report import Row
from benchmarks.gpu.serving import GREEDY, Serving
from server.engine.core import Engine
from server.engine.messages import Abort, AddRequest
from server.engine.request import LaneSpec, Sampling
from server.model.runner import ModelRunner

SAMPLED = Sampling(temperature=0.8, top_p=0.95, seed=7)


def by_overlap(bench: Bench, serving: Serving, context: int, batches: Sequence[int]) -> Iterator[Row]:
    """Between tokens, everything included but the way to the front. Prompts are the same in every row, so that all but
    the first find them in the cache."""
    for batch in batches:
        for kind, sampling in (("greedy", GREEDY), ("top-p", SAMPLED))[: bench.scale.size(2, 1)]:
            for overlaps in (False, True):
                seconds = _step(bench, serving, context, batch, sampling, overlaps)
                yield {"engine step": "one in flight" if overlaps else "one at a time", "batch": batch, "tokens": kind,
                       "wall ms": seconds * 1e3, "tokens/s": batch / seconds}  # fmt: skip


def _step(bench: Bench, serving: Serving, context: int, batch: int, sampling: Sampling, overlaps: bool) -> float:
    it, steps, rng = serving.assembly, bench.scale.size(60, 2), random.Random(0)
    runner = ModelRunner(it.runner.forward, it.residency, serving.block_size, it.masks, overlaps)
    limits = replace(it.limits, overlaps=overlaps)
    engine = Engine(limits, it.kv_cache, runner, it.residency, it.checker, it.masks)
    prompt = context - steps - 2
    lanes = [[LaneSpec(rng.choices(range(serving.info.vocab_size), k=prompt))] for _ in range(batch)]
    asked = [AddRequest(index, index, lane, steps + 64, sampling, frozenset()) for index, lane in enumerate(lanes)]
    events = engine.step(asked)
    while len({event.request_id for event in events if hasattr(event, "request_id")}) < batch:
        events += engine.step(())
    start = time.perf_counter()
    for _ in range(steps):
        engine.step(())
    seconds = (time.perf_counter() - start) / steps
    engine.step([Abort(list(range(batch)))])
    engine.step(())
    engine.check()
    return seconds
