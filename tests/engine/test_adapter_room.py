"""Who waits for adapter room, who is held back for it, what is prefetched, and what is put into quarantine."""

from collections.abc import Collection, Sequence

import pytest

from adapters_store.ref import AdapterRef
from server.engine.fake_runner import FakeResidency, FakeRunner
from server.engine.request import Fault, FinishReason, LaneSpec
from tests.support.driver import Answer
from tests.support.fake_engine import BLOCK, FakeEngine

QUARANTINED = "is in quarantine: the model's output was not finite in 3 requests in a row"


class Watched(FakeResidency):
    """One that remembers what it was asked."""

    def __init__(self, slots: int, polls_to_load: int = 0) -> None:
        super().__init__(slots, polls_to_load)
        self.prefetched: list[list[str]] = []
        self.num_looks = 0

    def prefetch(self, refs: Sequence[AdapterRef]) -> None:
        self.prefetched.append([ref.name for ref in refs])
        super().prefetch(refs)

    def in_the_way(self, refs: Collection[AdapterRef]) -> Collection[AdapterRef]:
        self.num_looks += 1
        return super().in_the_way(refs)


def test_while_one_adapter_drains_for_another_everybody_else_goes_on() -> None:
    setup = FakeEngine(blocks=800, slots=4, max_running=80, tokens_per_step=80, max_skips=3)
    refs = [setup.adapter(f"there {number}") for number in range(4)]
    for ref in refs:
        setup.add([1], 12, ref)
    setup.step()
    starving = setup.add([2], 3, setup.adapter("rare"))
    held_back: list[int] = []
    while not starving.tokens:
        late = [setup.add([3], 12, ref) for ref in refs]
        setup.step()
        held_back.append(sum(not setup.is_running(it) and not it.finish for it in late))
    assert held_back[:4] == [0] * 4  # not yet
    assert set(held_back[5:]) == {1}  # then one of four, until its answers have ended
    assert len(held_back) <= 4 + 12 + 4


def test_nothing_is_brought_in_before_what_starves() -> None:
    setup = FakeEngine(residency=FakeResidency(1, polls_to_load=3), max_skips=3)
    popular, rare, other = (setup.adapter(name) for name in ("popular", "rare", "other"))
    first = setup.add([1], 20, popular)
    setup.run(4)
    starving = setup.add([2], 3, rare)
    setup.step()
    setup.run(6)
    late = setup.add([3], 3, other)  # it was served less than nobody, and is next in turn with the one that starves
    while not starving.tokens:
        setup.step()
        assert not late.tokens
    setup.run(10)
    assert first.finish is late.finish is FinishReason.LENGTH


def test_those_that_starve_are_looked_for_only_where_some_do() -> None:
    residency = Watched(2)
    setup = FakeEngine(residency=residency, max_skips=3)
    a, b = setup.adapter("a"), setup.adapter("b")
    for _ in range(6):
        setup.add([1], 5, a)
        setup.add([1], 5, b)
        setup.step()
    assert residency.num_looks == 0


def test_two_requests_that_need_several_adapters_do_not_evict_each_others_for_ever() -> None:
    setup = FakeEngine(residency=FakeResidency(2, polls_to_load=3), max_skips=100)
    a, b, c, d = (setup.adapter(name) for name in "abcd")
    answers = [setup.add([1], 2, x, beside=[LaneSpec([1], y)]) for x, y in ((a, b), (c, d), (b, c), (d, a))]
    setup.run(40)
    assert all(answer.finish is FinishReason.LENGTH for answer in answers)


# -- prefetch -----------------------------------------------------------


def test_the_adapters_of_those_who_are_next_are_prefetched_each_once_and_in_order() -> None:
    residency = Watched(30)
    setup = FakeEngine(residency=residency, max_running=1, max_waiting=1000)
    setup.add([1], 100)
    setup.step()
    assert residency.prefetched == []  # nobody waits
    refs = [setup.adapter(f"{number}") for number in range(40)]
    for ref in refs:
        for _ in range(3):
            setup.add([1], 1, ref)
    setup.step()
    assert residency.prefetched == [[f"{number}" for number in range(16)]]
    assert {it.ref for it in residency.report()} == set(refs[:16])


def test_what_is_prefetched_is_found_out_again_only_where_somebody_came_or_went() -> None:
    residency = Watched(30)
    setup = FakeEngine(residency=residency, max_running=1)
    setup.add([1], 100)
    waiting = setup.add([1], 1, setup.adapter("first"))
    setup.step()
    lines = setup.scheduler.waiting.lines
    num_looks = 0

    def counted():  # type: ignore[no-untyped-def]
        nonlocal num_looks
        num_looks += 1
        return lines()

    setup.scheduler.waiting.lines = counted  # type: ignore[method-assign]
    setup.run(5)
    assert num_looks == 0 and residency.prefetched == [["first"]] * 6
    setup.add([1], 1, setup.adapter("second"))
    setup.run(2)
    setup.abort(waiting)
    setup.run(2)
    assert num_looks == 2 and residency.prefetched[6:] == [["first", "second"]] * 2 + [["second"]] * 2


def test_with_prefetch_an_adapter_is_there_when_a_place_is() -> None:
    setup = FakeEngine(residency=FakeResidency(2, polls_to_load=8), max_running=1)
    first = setup.add([1], 10)
    setup.step()
    waiting = setup.add([1], 1, setup.adapter("a"))
    while first.finish is None:
        setup.step()
    setup.step()
    assert waiting.finish is FinishReason.LENGTH


# -- outputs that are no numbers -----------------------------------------------------------


class Sick:
    """An engine with adapters, of which "sick" gives no numbers for as long as it is said to."""

    def __init__(self, **limits: int) -> None:
        self.runner = FakeRunner(50, BLOCK)
        self.setup = FakeEngine(runner=self.runner, slots=3, **limits)
        self.sick, self.well = self.setup.adapter("sick"), self.setup.adapter("well")
        self.turn(sick=True)

    def turn(self, sick: bool) -> None:
        self.runner.not_finite = {"sick"} if sick else set()

    def ask(self, ref: AdapterRef | None = None, max_tokens: int = 1, beside: Sequence[LaneSpec] = ()) -> Answer:
        answer = self.setup.add([1], max_tokens, ref or self.sick, beside=beside)
        self.setup.run(max(1, max_tokens))
        return answer


def test_the_third_in_a_row_puts_the_adapter_into_quarantine_and_others_go_on() -> None:
    it = Sick()
    answers = [it.ask() for _ in range(3)]
    assert [(answer.error, answer.fault) for answer in answers] == [
        ("the output is not finite", fault) for fault in (None, None, Fault.QUARANTINED)
    ]
    late = it.ask()
    assert late.error == f"the adapter 'sick' {QUARANTINED}" and late.fault is Fault.QUARANTINED
    assert it.ask(it.well).finish is FinishReason.LENGTH


def test_requests_that_wait_for_one_in_quarantine_fail_with_it() -> None:
    it = Sick(max_running=1)
    answers = [it.setup.add([number], 5, it.sick) for number in range(6)]
    well = it.setup.add([1], 1, it.well)
    it.setup.run(8)
    assert [answer.fault for answer in answers] == [None, None, *[Fault.QUARANTINED] * 4]
    assert [answer.error for answer in answers[3:]] == [f"the adapter 'sick' {QUARANTINED}"] * 3
    assert well.finish is FinishReason.LENGTH


def test_one_that_ended_well_between_them_begins_the_count_anew() -> None:
    it = Sick()
    for _ in range(3):
        assert [it.ask().fault, it.ask().fault] == [None, None]
        it.turn(sick=False)
        assert it.ask(max_tokens=3).finish is FinishReason.LENGTH
        it.turn(sick=True)


def test_one_that_was_aborted_or_is_under_way_does_not() -> None:
    it = Sick()
    it.turn(sick=False)
    under_way, aborted = it.setup.add([1], 10, it.sick), it.setup.add([1], 10, it.sick)
    it.setup.run(2)
    it.setup.abort(aborted)
    it.setup.step()
    it.turn(sick=True)
    assert [it.ask(max_tokens=1).fault, under_way.fault, it.ask().fault] == [None, None, Fault.QUARANTINED]


def test_registered_again_it_is_served_again_and_one_more_is_enough_unless_one_ends_well() -> None:
    it = Sick()
    for _ in range(3):
        it.ask()
    it.setup.register(it.sick)
    assert it.ask().error == "the output is not finite" and it.ask().fault is Fault.QUARANTINED
    it.setup.register(it.sick)
    it.turn(sick=False)
    assert it.ask().finish is FinishReason.LENGTH
    it.turn(sick=True)
    assert [it.ask().fault for _ in range(3)] == [None, None, Fault.QUARANTINED]


@pytest.mark.parametrize("beside", ["well", "sick"])
def test_where_several_lanes_have_adapters_it_is_nobodys_fault_for_certain(beside: str) -> None:
    it = Sick()
    lanes = [LaneSpec([1], AdapterRef(beside, beside, "lora"))]
    answers = [it.ask(it.well if beside == "sick" else it.sick, beside=lanes) for _ in range(5)]
    assert {(answer.error, answer.fault) for answer in answers} == {("the output is not finite", None)}
    assert it.ask(it.well).finish is FinishReason.LENGTH
