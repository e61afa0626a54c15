"""Adapter room that others hold: whoever waits for it gets it, by the real scheduler over real memory.

In each of these the adapter would never have come to the device: others are always asked for, none of them is ever idle
long enough, and what lies idle is not enough.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_store.rules import Adapter
from server.engine.request import Fault
from server.engine.residency import AdapterFailed, Wait
from server.model.probe import PROBE
from tests.support.driver import Answer
from tests.support.engine_harness import Engine
from tests.support.stepped_residency import CHANGED, SteppedLoading
from tests.support.tiny_adapters import ATTENTION, register, save_lora
from tests.support.tiny_models import make_model
from tests.support.waiting import eventually

KEYS = 114_688  # bytes of a LoRA of rank 16 on all of attention


def lora(engine: Engine, path: Path, rank: int) -> Adapter:
    return register(engine, save_lora(path, make_model("llama"), rank, ATTENTION, rank=rank))


def steps_until(engine: Engine, it: Answer, keep_busy: Callable[[int], None], most: int = 500) -> int:
    for number in range(most):
        keep_busy(number)
        engine.step()
        if it.finish is not None:
            return number
        time.sleep(0.0005)  # loads take their time
    raise AssertionError(f"nothing came of it in {most} steps")


@pytest.mark.parametrize("num_small", [2, 3])
def test_one_adapter_that_needs_the_room_of_several_busy_ones(tmp_path: Path, num_small: int) -> None:
    engine = Engine(make_model("llama", attention=PROBE), adapter_bytes=num_small * KEYS + 8192, adapter_slots=8,
                    max_skips=10, max_running=16)  # fmt: skip
    small = [register(engine, save_lora(tmp_path / f"s{seed}", make_model("llama"), seed, ATTENTION, rank=16))
             for seed in range(num_small)]  # fmt: skip
    large = lora(engine, tmp_path / "large", 16 * num_small - 2)
    answers: list[Answer] = []

    def keep_busy(number: int) -> None:
        for index, entry in enumerate(small):
            own = [it for it in answers if it.adapter == entry.ref and it.finish is None]
            answers.extend(engine.add([3, 4, 5 + number % 50], 12 + 7 * index, entry.ref) for _ in range(3 - len(own)))

    for number in range(20):
        keep_busy(number)
        engine.step()
    waits = engine.add([7, 8, 9], 4, large.ref)
    assert steps_until(engine, waits, keep_busy) < 150 and waits.error is None
    before = sum(it.finish is not None for it in answers)
    for number in range(60):
        keep_busy(number)
        engine.step()
        time.sleep(0.0005)
    assert sum(it.finish is not None for it in answers) > before + 5, "and the others go on"


@pytest.mark.parametrize(("concurrency", "length"), [(16, 30), (6, 24)])
def test_an_adapter_beside_kv_blocks_that_are_always_in_use(tmp_path: Path, concurrency: int, length: int) -> None:
    """The second one after a peak: few blocks are held, and they are everywhere."""
    engine = Engine(make_model("llama", attention=PROBE), memory_budget=1 << 20, kv_cache_bytes=0, adapter_bytes=0,
                    adapter_slots=0, max_skips=10, max_running=32, tokens_per_step=64)  # fmt: skip
    entry, answers = lora(engine, tmp_path / "a", 60), list[Answer]()
    share = engine.residency._pool.share
    kv = next(it for it in share.budget.shares if it is not share)

    def keep_busy(number: int, most: int = concurrency) -> None:
        running = [it for it in answers if it.finish is None]
        for index in range(most - len(running)):
            prompt = [3 + (len(answers) + index) % 190, 4 + index % 7, 5 + number % 50] * (length // 3)
            answers.append(engine.add(prompt, 20 + index % 5 * 9))

    for number in range(100):
        keep_busy(number, 16)
        engine.step()
    assert kv.used > 1.5 * kv.floor
    waits = engine.add([7, 8, 9], 4, entry.ref)
    assert steps_until(engine, waits, keep_busy) < 250 and waits.error is None
    assert share.claimed == 0
    engine.run()


def test_where_memory_is_divided_for_good_adapters_have_what_kv_blocks_cannot(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE), memory_budget=1 << 19, kv_cache_bytes=0, adapter_bytes=0,
                    adapter_slots=0)  # fmt: skip
    share = engine.residency._pool.share
    assert share.cap + next(it for it in share.budget.shares if it is not share).used <= share.budget.total
    answer = engine.add([3, 4, 5], 4, lora(engine, tmp_path / "a", 16).ref)
    engine.run()
    assert answer.error is None and len(answer.tokens) == 4


def test_what_does_not_fit_beside_pinned_adapters_says_so_and_holds_up_nobody(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE), adapter_bytes=2 * KEYS, adapter_slots=4)
    pinned, small, large = (lora(engine, tmp_path / str(rank), rank) for rank in (16, 2, 20))
    engine.register(pinned.ref, pinned.package, pinned=True)
    answers = [engine.add([3, 4, 5], 4, it.ref) for it in (large, pinned, small)]
    engine.run()
    assert answers[0].fault is Fault.UNAVAILABLE and "1 pinned adapters leave" in str(answers[0].error)
    assert [len(it.tokens) for it in answers[1:]] == [4, 4]


def test_a_registration_is_not_undone_by_what_was_loaded_for_the_one_before(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE))
    path = save_lora(tmp_path / "a", make_model("llama"), 1, ATTENTION)
    entry = register(engine, path)
    weights = path / "adapter_model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    waits = engine.add([1, 2], 3, entry.ref)
    engine.step()  # the load begins
    job = engine.residency._adapters[entry.ref].job
    assert job is not None
    eventually(lambda: job.done)
    weights.write_bytes(sound)
    engine.register(entry.ref, entry.package)
    engine.run()
    assert waits.error is None and len(waits.tokens) == 3


def test_and_what_is_loaded_for_the_new_one_counts_again(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE))
    residency, loading = engine.residency, SteppedLoading(engine.residency)
    entry = lora(engine, tmp_path / "a", 4)
    assert residency.acquire(entry.ref) is Wait.LOADING
    residency.register(entry.ref, entry.package)
    loading.run_next(CHANGED)
    residency.poll()
    residency.check()
    assert residency.acquire(entry.ref) is Wait.LOADING
    loading.run_next()  # what was mapped for the first goes
    loading.run_next(CHANGED)
    residency.poll()
    with pytest.raises(AdapterFailed, match="is in quarantine"):
        residency.acquire(entry.ref)
    residency.check()
