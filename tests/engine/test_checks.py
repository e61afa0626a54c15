"""Checks beside the scheduler: when they get their turns, what they hold meanwhile, and what they leave behind."""

from collections.abc import Sequence

import pytest

from adapters_store.ref import AdapterRef
from server.engine.block_pool import Block
from server.engine.checks import CheckFailed, Found
from server.engine.core import Pace
from server.engine.fake_runner import FakeResidency, FakeRunner, expected_tokens
from server.engine.kv_cache import KVCache
from server.engine.messages import AdapterChecked
from server.engine.request import Slot
from server.engine.residency import AdapterFailed, Wait
from server.engine.scheduler import SchedulerLimits
from tests.support.driver import Driver

BLOCKS, BLOCK = 8, 4
A, B = AdapterRef("a", "1", "lora"), AdapterRef("b", "2", "lora")
FOUND = Found(0.5, 4.0)


class Script:
    """A checker that notes its turns. polls: how often it is asked before it is ready."""

    def __init__(self) -> None:
        self.turns: list[tuple[object, ...]] = []
        self.polls = 0
        self.fails_at: str | None = None

    def refusal(self, num_tokens: int) -> str | None:
        return "too many" if num_tokens > 20 else None

    def compare(self, ref: AdapterRef, num_tokens: int) -> "Script":
        self.turns.append(("compare", ref, num_tokens))
        return self

    def run_adapter(self, slot: Slot, blocks: Sequence[Block]) -> None:
        self._turn("adapter", slot, blocks)

    def is_ready(self) -> bool:
        self.polls -= 1
        return self.polls < 0

    def run_merged(self, blocks: Sequence[Block]) -> Found:
        self._turn("merged", None, blocks)
        return FOUND

    def _turn(self, name: str, slot: Slot | None, blocks: Sequence[Block]) -> None:
        assert len(set(blocks)) == len(blocks)
        self.turns.append((name, slot, len(blocks)))
        if self.fails_at == name:
            raise CheckFailed(f"{name} is not finite")


class Residency(FakeResidency):
    """One that says what is pinned, and may fail."""

    fails = False
    forgotten: tuple[AdapterRef, ...] = ()

    def acquire(self, ref: AdapterRef) -> Slot | Wait:
        if self.fails:
            raise AdapterFailed(ref, "its file is gone")
        return super().acquire(ref)

    def forget(self, ref: AdapterRef) -> None:
        super().forget(ref)
        self.forgotten += (ref,)

    @property
    def num_pins(self) -> int:
        return sum(self._pins.values())


class Setup(Driver):
    def __init__(self, polls_to_load: int = 0, slots: int = 2) -> None:
        self.script, self.adapters = Script(), Residency(slots, polls_to_load)
        limits = SchedulerLimits(tokens_per_step=16, max_running=4, max_waiting=10, max_skips=5)
        super().__init__(limits, KVCache(BLOCKS, BLOCK), FakeRunner(BLOCKS, BLOCK), self.adapters, self.script)
        self.register(A)
        self.register(B)
        self.step()

    def run(self, steps: int = 20) -> None:
        for _ in range(steps):
            self.step()


def test_a_check_takes_two_steps_of_which_each_computes_one_prefill() -> None:
    it = Setup()
    number = it.ask_for_check(A, 9)
    it.step()
    assert it.script.turns == [("compare", A, 9), ("adapter", 1, 3)]
    assert it.engine.pace is Pace.LOADING and not it.checked
    assert it.adapters.num_pins == 0 and it.kv_cache.pool.num_free == BLOCKS
    it.step()
    assert it.script.turns[2:] == [("merged", None, 3)]
    assert it.checked == {number: AdapterChecked(number, 0.5, 4.0)}
    assert it.engine.pace is Pace.IDLE and it.kv_cache.pool.num_free == BLOCKS
    it.run(3)
    assert len(it.script.turns) == 3


def test_it_waits_for_a_transfer_and_for_what_the_checker_reads_without_holding_up_others() -> None:
    it = Setup(polls_to_load=2)
    it.script.polls = 3
    it.ask_for_check(A)
    it.step()
    assert it.script.turns == [] and it.engine.pace is Pace.LOADING
    answer = it.add([5, 6], 4)
    steps = 1
    while not it.checked:
        it.step()
        steps += 1
        assert it.checked or it.engine.pace is not Pace.IDLE
    assert steps == 7  # two polls to load, three to be ready
    assert answer.tokens == expected_tokens(None, [5, 6], 4, 1000)


def test_one_after_another_in_order() -> None:
    it = Setup()
    numbers = [it.ask_for_check(ref) for ref in (A, B, A)]
    it.run()
    assert list(it.checked) == numbers
    assert [turn[0] for turn in it.script.turns] == ["compare", "adapter", "merged"] * 3


def test_it_holds_the_revision_against_removal() -> None:
    it = Setup(polls_to_load=2)
    first, second = it.ask_for_check(A), it.ask_for_check(A)
    it.step()
    it.remove(A)
    late = it.ask_for_check(A)
    it.step()
    assert it.checked == {late: AdapterChecked(late, None, error="the adapter 'a' is no longer served")}
    while second not in it.checked:
        assert it.adapters.forgotten == ()
        it.step()
    assert it.checked[first].max_difference == it.checked[second].max_difference == 0.5
    assert it.adapters.forgotten == (A,)
    it.run(2)
    assert it.engine.pace is Pace.IDLE


def test_without_free_kv_blocks_it_waits_and_takes_none_from_those_that_run() -> None:
    it = Setup()
    answer = it.add([5] * 12, 20)  # 31 tokens come to be computed: all blocks
    it.run(5)
    number = it.ask_for_check(A, 20)
    while answer.finish is None:
        assert not it.script.turns
        it.step()
    it.run()
    assert answer.tokens == expected_tokens(None, [5] * 12, 20, 1000)
    assert it.checked[number].error is None and it.scheduler.num_preemptions == 0


def test_without_a_slot_it_waits() -> None:
    it = Setup(slots=1)
    answer = it.add([5], 6, B)
    number = it.ask_for_check(A)
    while answer.finish is None:
        assert number not in it.checked
        it.step()
    it.run(3)
    assert it.checked[number].max_difference == 0.5


def test_an_adapter_that_cannot_be_loaded_ends_the_check_and_not_those_behind_it() -> None:
    it = Setup()
    it.adapters.fails = True
    number = it.ask_for_check(A)
    it.step()
    assert it.checked[number].error == "the adapter 'a' could not be loaded: its file is gone"
    it.adapters.fails = False
    number = it.ask_for_check(B)
    it.run(2)
    assert it.checked[number].error is None


@pytest.mark.parametrize("prefill", ["adapter", "merged"])
def test_one_that_fails_leaves_nothing_behind(prefill: str) -> None:
    it = Setup()
    it.script.fails_at = prefill
    number, behind = it.ask_for_check(A), it.ask_for_check(B)
    while number not in it.checked:
        it.step()
    assert it.checked[number] == AdapterChecked(number, None, error=f"{prefill} is not finite")
    assert it.adapters.num_pins == 0 and it.kv_cache.pool.num_free == BLOCKS
    it.script.fails_at = None
    it.remove(A)
    it.run(3)
    assert it.checked[behind].error is None and it.adapters.forgotten == (A,)


@pytest.mark.parametrize(
    ("num_tokens", "error"),
    [(0, "KV cache for 1 to 32"), (33, "a check of 33 tokens; there is KV cache for 1 to 32"), (21, "too many")],
)
def test_one_that_can_never_run_is_refused_at_once(num_tokens: int, error: str) -> None:
    it = Setup()
    number = it.ask_for_check(A, num_tokens)
    it.step()
    assert error in str(it.checked[number].error)
    assert not it.script.turns and it.engine.pace is Pace.IDLE


def test_its_blocks_are_nobodys_prefix() -> None:
    """And a prefix that others left survives where there is room beside it."""
    it = Setup()
    prompt = [7] * 9
    it.add(prompt, 1)
    it.run(2)
    it.ask_for_check(A, 12)
    it.run(3)
    again = it.add(prompt, 1)
    it.run(2)
    assert again.num_cached_tokens == 8
    assert again.tokens == expected_tokens(None, prompt, 1, 1000)
