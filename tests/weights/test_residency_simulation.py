"""The whole of weights under the engine, without a model: one budget, tiers, loads that fail at every turn.

The real scheduler, block pool, residency, host cache, transfers and files; a table that remembers what it was filled
with, memory that is only counted, and FakeRunner, who knows the right answer of every request. `make simulate` runs a
million steps; `python -m tests.weights.test_residency_simulation --steps N --seed S` reproduces one run.
"""

import argparse
import contextlib
import hashlib
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from adapters_store.parts import AdapterPackage, LowRank, SourceFile, TensorRef
from adapters_store.ref import AdapterRef
from kernels.adapter_rows import ShapeKey
from server.engine.block_memory import Extent
from server.engine.fake_runner import FakeRunner, Known, expected_tokens
from server.engine.kv_cache import KVCache
from server.engine.plan import Plan
from server.engine.request import Fault, FinishReason, Tier
from server.engine.scheduler import SchedulerLimits
from server.weights import known
from server.weights.arena import PageWork
from server.weights.budget import MemoryBudget, Share
from server.weights.chunks import HostChunks
from server.weights.host_cache import HostCache
from server.weights.kv_memory import IdleBlocks
from server.weights.page_pool import PagePool
from server.weights.residency import DeviceResidency
from server.weights.staging import HostCopy
from server.weights.tables.table import Prepared
from tests.support.breadth import always
from tests.support.driver import GREEDY, Answer, Driver
from tests.support.stepped_residency import CHANGED, GONE, NO_MEMORY, SteppedLoading

VOCAB, BLOCK, EXTENT_BLOCKS = 50, 4, 4
PAGE, EXTENT_BYTES = 64, 256
BUDGET, KV_FLOOR, KV_CAP, ADAPTER_FLOOR, ADAPTER_CAP = 6400, 1600, 5600, 800, 4800
SLOTS, ADAPTERS = 12, 24
CHUNK, CHUNKS = 256, 40
MOST_STEPS = 600  # that a request waits, of 25 that may be there


class CountedMemory:
    """Extents of which there is nothing but the account."""

    extent_blocks = EXTENT_BLOCKS

    def __init__(self, share: Share, rng: random.Random, counts: Counter[str]) -> None:
        self._share, self._rng, self._counts = share, rng, counts
        self._num_there = 0
        self.is_full = False  # somebody else has what is left of the device

    def num_obtainable(self) -> int:
        return 0 if self.is_full else max(0, self._share.within_reach // EXTENT_BYTES)

    def num_left(self) -> int:
        return self._share.left // EXTENT_BYTES if self._share.are_claimed else self._num_there

    def take(self, extent: Extent, unused_since: float) -> bool:
        if self.is_full or not self._share.make_room(EXTENT_BYTES, unused_since):
            return False
        if self._rng.random() < 0.01 and self._share.used >= KV_FLOOR:
            self.is_full = True
            self._counts["extents that could not be had"] += 1
            return False
        self._share.take(EXTENT_BYTES)
        self._num_there += 1
        self._counts["extents taken"] += 1
        return True

    def give_back(self, extent: Extent) -> None:
        self._share.give_back(EXTENT_BYTES)
        self._num_there -= 1
        self._counts["extents given back"] += 1

    def check(self, there: Collection[Extent]) -> None:
        assert len(there) == self._num_there and self._share.used == self._num_there * EXTENT_BYTES


class CountedLayout(NamedTuple):
    parts: list[LowRank]
    num_pages: int
    refusal: str | None = None


class Remembering:
    """A table that knows what was copied to each slot, and what kernels would see there."""

    kind = LowRank

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._mapped: dict[int, CountedLayout] = {}
        self._filled: dict[int, torch.Tensor] = {}
        self.shown: dict[int, float] = {}

    def layout(self, parts: list[LowRank]) -> CountedLayout:
        num_bytes = sum(part.num_bytes(4) for part in parts)
        return CountedLayout(parts, -(-num_bytes // PAGE))

    def pages_for(self, layout: CountedLayout) -> int:
        return layout.num_pages

    def map(self, slot: int, layout: CountedLayout) -> None:
        assert slot not in self._mapped
        self._pool.take(layout.num_pages)
        self._mapped[slot] = layout

    def prepare(self, slot: int) -> Prepared:
        (part,) = self._mapped[slot].parts
        room = self._filled[slot] = torch.full((part.a.num_elements + part.b.num_elements,), float("nan"))
        a, b = room.split([part.a.num_elements, part.b.num_elements])
        (of_a, of_b) = part.tensors
        return Prepared([(of_a, a.view(part.a.shape)), (of_b, b.view(part.b.shape))], checked=[room])

    def install(self, slot: int) -> None:
        (value,) = set(self._filled[slot].tolist())
        self.shown[slot] = value

    def unmap(self, slot: int) -> None:
        self._pool.give_back(self._mapped.pop(slot).num_pages)
        self._filled.pop(slot, None)
        self.shown.pop(slot, None)

    def has(self, slot: int) -> bool:
        return slot in self._mapped

    def shape_key(self, slot: int) -> ShapeKey:
        return ShapeKey()

    @property
    def num_mapped_pages(self) -> int:
        return sum(layout.num_pages for layout in self._mapped.values())

    def check(self) -> None:
        assert self.shown.keys() <= self._mapped.keys()


class NoArenas:
    """Pages need nothing done."""

    page_bytes = PAGE

    @contextlib.contextmanager
    def deferred(self) -> Iterator[PageWork]:
        yield PageWork()


class Seeing(FakeRunner):
    """Whoever computes with a slot finds there what its request named."""

    def __init__(self, num_blocks: int, table: Remembering) -> None:
        super().__init__(num_blocks, BLOCK, VOCAB)
        self._table = table

    def launch(self, plan: Plan) -> Known:
        for it in plan:
            if it.lane.adapter is not None:
                assert self._table.shown[it.lane.slot] == float(it.lane.adapter.revision)
        return super().launch(plan)


class Simulation(Driver):
    def __init__(self, root: Path, seed: int) -> None:
        self.rng, self.counts = random.Random(seed), Counter[str]()
        budget = MemoryBudget(BUDGET)
        share = budget.open("KV blocks", KV_FLOOR, KV_CAP)
        pool = PagePool(budget.open("adapters", ADAPTER_FLOOR, ADAPTER_CAP), PAGE)
        table = Remembering(pool)
        cache = HostCache(HostChunks(CHUNK * CHUNKS, is_pinned=False, chunk_bytes=CHUNK))
        residency = DeviceResidency(SLOTS, pool, [table], NoArenas(), None, HostCopy(), cache)  # type: ignore[arg-type]
        self.loading = SteppedLoading(residency)
        memory = self._memory = CountedMemory(share, self.rng, self.counts)
        num_blocks = KV_CAP // EXTENT_BYTES * EXTENT_BLOCKS
        kv_cache = KVCache(num_blocks, BLOCK, memory, KV_FLOOR // EXTENT_BYTES * EXTENT_BLOCKS)
        share.idle = IdleBlocks(kv_cache.pool, EXTENT_BYTES)
        limits = SchedulerLimits(tokens_per_step=16, max_running=8, max_waiting=30, max_skips=10, vocab_size=VOCAB)
        super().__init__(limits, kv_cache, Seeing(num_blocks, table), residency)
        self._root, self._table, self._device = root, table, residency
        self._served: list[AdapterRef] = []
        self._packages = [self._write(number) for number in range(ADAPTERS)]
        self._live: list[Answer] = []
        self._asked: dict[int, int] = {}  # in which step
        self._aborted: set[int] = set()
        self._idle_steps = 0
        residency._tiers.move = self._counting(residency._tiers.move)  # type: ignore[method-assign]

    def _counting(self, move):  # type: ignore[no-untyped-def]
        def count(it: known.Known, to: Tier) -> None:
            self.counts[f"{it.tier} -> {to}"] += 1
            move(it, to)

        return count

    def _write(self, number: int) -> AdapterPackage:
        """All its values are its number, which is its revision too."""
        rank = 1 + number % 7
        a, b = torch.full((rank, 20), float(number)), torch.full((12, rank), float(number))
        raw = a.numpy().tobytes() + b.numpy().tobytes()
        path = self._root / str(number)
        path.write_bytes(raw)
        file = SourceFile("weights", str(path), len(raw), hashlib.sha256(raw).hexdigest())
        part = LowRank("m", TensorRef("weights", "a", tuple(a.shape), "F32", 0),
                       TensorRef("weights", "b", tuple(b.shape), "F32", a.nbytes), 1.0)  # fmt: skip
        return AdapterPackage("lora", str(number), (file,), (part,))

    def act(self) -> None:
        rng = self.rng
        match rng.randrange(20):
            case 0 if len(self._served) < ADAPTERS:
                self._register(rng.choice([it for it in range(ADAPTERS) if self._ref(it) not in self._served]))
            case 1 if len(self._served) > ADAPTERS // 2 and rng.random() < 0.3:
                ref = rng.choice(self._served)
                self._served.remove(ref)
                self.remove(ref)
            case 2 if self._served:
                self._register(int(rng.choice(self._served).revision), pinned=rng.random() < 0.05)
            case 3 if self._live:
                answer = rng.choice(self._live)
                self.abort(answer)
                self._aborted.add(answer.id)
            case 4 if self._served and rng.random() < 0.1:
                self._device.quarantine(rng.choice(self._served), "its outputs are no numbers")
            case 5 | 6 | 7 if len(self._live) < 25:
                self._ask()
            case 8 | 9 | 10 | 11 | 12 if self.loading.pending:
                # faults come in times of trouble, with times of calm between them
                fault = rng.choice([None, None, GONE, NO_MEMORY, CHANGED]) if self.is_troubled else None
                self.counts["faults"] += fault is not None
                self.loading.run_next(fault)
            case _:
                self.step()

    @property
    def is_troubled(self) -> bool:
        return self.counts["steps"] // 500 % 3 == 2

    def _ask(self) -> None:
        rng = self.rng
        # most ask for few adapters, and these are others every while
        favourite = self.counts["steps"] // 300 % max(1, len(self._served))
        adapters = [
            None,
            *self._served[favourite : favourite + 4],
            *rng.sample(self._served, min(3, len(self._served))),
        ]
        prompt = [rng.randrange(2)] * rng.randrange(20) + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 12))]
        answer = self.add(prompt, rng.choice([1, 5, 20, 60]), rng.choice(adapters), GREEDY,
                          weight=rng.choice([1.0, 1.0, 4.0]), priority=rng.choice([0, 0, 0, 1]))  # fmt: skip
        self._live.append(answer)
        self._asked[answer.id] = self.counts["steps"]
        self.counts["requests"] += 1

    def _ref(self, number: int) -> AdapterRef:
        return AdapterRef(f"adapter-{number}", str(number), "lora")

    def _register(self, number: int, pinned: bool = False) -> None:
        ref = self._ref(number)
        self.register(ref, self._packages[number], pinned)
        if ref not in self._served:
            self._served.append(ref)

    def step(self) -> Plan:
        self.now += self.rng.choice([0.001, 0.01, 1.0])
        plan = super().step()
        self.counts["steps"] += 1
        self._memory.is_full &= self.rng.random() < 0.95
        for answer in self._live:
            if answer.finish is not None:
                self._verify(answer)
        self._live = [answer for answer in self._live if answer.finish is None]
        self._bound_waits()
        # nothing is for ever in the way: a step that computes nothing waits for a load, and loads end
        waits_in_vain = not plan and self._live and not self.loading.pending
        self._idle_steps = self._idle_steps + 1 if waits_in_vain else 0
        assert self._idle_steps < 50
        return plan

    def _bound_waits(self) -> None:
        """Nobody waits for ever, however large its adapter is beside those of others, and whoever holds the memory."""
        waits = [self.counts["steps"] - self._asked[answer.id] for answer in self._live if not answer.tokens]
        longest = max(waits, default=0)
        self.counts["longest wait in steps"] = max(self.counts["longest wait in steps"], longest)
        assert longest < MOST_STEPS

    def _verify(self, answer: Answer) -> None:
        self.counts[f"ended: {answer.finish}{f', {answer.fault}' if answer.fault else ''}"] += 1
        assert answer.tokens == expected_tokens(answer.adapter, answer.prompt, len(answer.tokens), VOCAB)
        match answer.finish:
            case FinishReason.LENGTH:
                assert len(answer.tokens) == answer.max_tokens
            case FinishReason.ABORT:
                assert answer.id in self._aborted
            case FinishReason.ERROR if answer.fault is Fault.UNAVAILABLE:
                said = ("could not be loaded: No such file", "out of memory", "pinned adapters leave")
                assert any(it in str(answer.error) for it in said), answer.error
            case FinishReason.ERROR if answer.fault is Fault.QUARANTINED:
                assert "is in quarantine: " in str(answer.error)
            case _:
                said = ("tokens of KV cache; there are", "are waiting, as many as", "is no longer served")
                assert any(it in str(answer.error) for it in said), answer.error

    def drain(self) -> None:
        """Without faults, everybody comes to an end, and all memory is given back."""
        for ref in self._served:
            self._register(int(ref.revision))
        for _ in range(30_000):
            if self.is_done:
                break
            if self.loading.pending:
                self.loading.run_next()
            self.step()
        assert not self._live and self.is_done
        for ref in tuple(self._served):
            self.remove(ref)
        for _ in range(100):
            self.step()
            self.loading.run_all()
        assert self._device.report() == () and not self._table.has(1)
        memory = self._device.memory()
        assert memory.adapter_bytes == 0 and self.kv_cache.pool.num_held == 0


def simulate(steps: int, seed: int, root: Path) -> Counter[str]:
    simulation = Simulation(root, seed)
    while simulation.counts["steps"] < steps:
        simulation.act()
    simulation.drain()
    return simulation.counts


@pytest.mark.parametrize("seed", always(range(3), 0))
def test_nothing_that_fails_leaks_blocks_or_starves_anybody(tmp_path: Path, seed: int) -> None:
    counts = simulate(3000, seed, tmp_path)
    assert counts["faults"] > 20 and counts["extents given back"] > 20 and counts["ended: length"] > 50
    assert counts["ended: error, unavailable"] and counts["ended: error, quarantined"]


def test_every_move_between_tiers_happens(tmp_path: Path) -> None:
    counts = simulate(8000, 11, tmp_path)
    assert {f"{one} -> {other}" for one, other in known.MOVES} == {it for it in counts if " -> " in it}


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate engine and weights, with loads that fail.")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.disable()  # of each fault
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as root:
        counts = simulate(options.steps, options.seed, Path(root))
    print(f"{counts['steps']:,} steps in {time.perf_counter() - start:.0f} s, 0 invariants broken")
    for what, count in sorted(counts.items()):
        print(f"  {what:30} {count:>12,}")


if __name__ == "__main__":
    sys.exit(main())
