"""What the scheduler promises to the token, the place and the block. Each is one step, or a few, of a small engine."""

from typing import Any

import pytest

from adapters_store.ref import AdapterRef
from server.engine.fake_runner import FakeResidency, FakeRunner, Known
from server.engine.plan import Output, Plan
from server.engine.request import BASE_SLOT, FinishReason, LaneSpec
from server.engine.residency import AdapterFailed, Wait
from tests.support.driver import Answer
from tests.support.fake_engine import BLOCK, FakeEngine

HOG, OTHER, THIRD = 10_000, 20_000, 30_000


def running(setup: FakeEngine, answers: list[Answer]) -> list[bool]:
    return [setup.is_running(answer) for answer in answers]


# -- who computes how many tokens -----------------------------------------------------------


def test_two_long_prompts_that_run_halve_the_budget() -> None:
    setup = FakeEngine(blocks=200, tokens_per_step=16)
    first = setup.add([1] * 200, 1)
    setup.step()
    second = setup.add([2] * 180, 1)
    assert setup.computed() == {first.id: 8, second.id: 8}
    for _ in range(4):  # half of what is left beside the token that is kept for the other goes to whoever is nearer
        assert setup.computed() in ({first.id: 9, second.id: 7}, {first.id: 7, second.id: 9})


def test_a_long_prompt_leaves_a_token_to_each_that_runs_behind_it() -> None:
    setup = FakeEngine(blocks=200, tokens_per_step=16)
    long = setup.add([1] * 200, 1, group=HOG)
    setup.step()
    short, other = setup.add([2], 30), setup.add([3], 30)
    assert setup.computed() == {long.id: 14, short.id: 1, other.id: 1}
    late = setup.add([4], 1, group=HOG)
    for _ in range(3):  # they are no prompts, and its own group's next one has no claim
        assert setup.computed() == {long.id: 14, short.id: 1, other.id: 1}
    assert not setup.is_running(late)


def test_prompts_of_one_group_are_computed_one_after_the_other() -> None:
    setup = FakeEngine(blocks=200, tokens_per_step=16)
    first, second = setup.add([1] * 100, 1, group=HOG), setup.add([2] * 100, 1, group=HOG)
    assert setup.computed() == {first.id: 16}
    other = setup.add([3], 1)
    assert setup.computed() == {first.id: 8, second.id: 8}
    assert setup.computed() == {first.id: 11, second.id: 4, other.id: 1}
    assert setup.computed() == {first.id: 15, second.id: 1}


def test_the_last_token_of_the_budget_starts_a_request_or_goes_to_a_prompt_that_was_cut() -> None:
    setup = FakeEngine(tokens_per_step=2)
    first, second = setup.add([1], 20, group=HOG), setup.add([2], 20, group=HOG)
    assert setup.computed() == {first.id: 1, second.id: 1}
    setup = FakeEngine(blocks=200, tokens_per_step=17)
    first = setup.add([1] * 200, 1)
    setup.step()
    second = setup.add([2] * 8, 1)
    assert setup.computed() == {first.id: 9, second.id: 8}


def test_what_a_prompt_that_gave_way_had_of_the_budget_goes_to_the_prompts_behind_it() -> None:
    setup = FakeEngine(blocks=200, tokens_per_step=16, max_running=3)
    hogs = [setup.add([1], 50, group=HOG), setup.add([2] * 200, 1, group=HOG)]
    setup.step()
    long = setup.add([3] * 200, 1, group=OTHER)
    setup.step()
    assert running(setup, [*hogs, long]) == [True] * 3
    small = setup.add([4], 5)
    assert setup.computed() == {hogs[0].id: 1, long.id: 14, small.id: 1}


# -- who starts -----------------------------------------------------------


def test_requests_start_together_where_what_they_have_fits_though_not_all_that_they_may_say() -> None:
    setup = FakeEngine(blocks=10)
    answers = [setup.add([number] * 4, 36) for number in range(3)]
    setup.step()
    assert running(setup, answers) == [True] * 3


def test_one_that_waits_for_a_place_or_for_tokens_is_no_wall_to_others() -> None:
    for limits in ({"max_running": 1}, {"tokens_per_step": 1}):
        setup = FakeEngine(**limits)
        first, second = setup.add([1], 20, group=HOG), setup.add([2], 20, group=HOG)
        for _ in range(3):
            assert setup.computed() == {first.id: 1}
        waiting = setup.request(second)
        assert waiting is not None and waiting.num_passes == 0


def test_a_request_starts_with_a_token_for_each_of_its_lanes_or_not_at_all() -> None:
    setup = FakeEngine(tokens_per_step=2)
    first = setup.add([1], 3)
    setup.step()
    wide = setup.add([2], 1, beside=[LaneSpec([3])])
    for _ in range(2):
        assert setup.computed() == {first.id: 1} and not setup.is_running(wide)
    assert setup.computed() == {wide.id: 2}


def test_others_pass_one_that_waits_for_blocks_so_often_and_no_more() -> None:
    setup = FakeEngine(blocks=20, max_skips=3)
    holder = setup.add([1] * 12, 50)
    setup.step()
    large = setup.add([2] * 70, 2)
    passed = 0
    for number in range(8):
        small = setup.add([number], 1)
        setup.step()
        passed += small.finish is not None
    assert passed == 3 and not setup.is_running(large)
    setup.abort(holder)
    setup.step()
    request = setup.request(large)
    assert request is not None and setup.is_running(large) and request.num_passes == 0


def test_one_that_is_passed_over_for_adapter_room_too_often_holds_others_back() -> None:
    setup = FakeEngine(slots=1, max_running=50, tokens_per_step=50, max_skips=3)
    popular, rare = setup.adapter("popular"), setup.adapter("rare")
    first = setup.add([1], 30, popular)
    setup.step()
    starving = setup.add([2], 30, rare)
    served = 0
    for _ in range(8):
        late = setup.add([3], 30, popular)
        setup.step()
        served += setup.is_running(late)
    assert served == 4
    setup.abort(first)
    for _ in range(40):
        setup.step()
        request = setup.request(starving)
        if setup.is_running(starving):
            break
    assert request is not None and setup.is_running(starving)


# -- who gives way -----------------------------------------------------------


def test_alone_in_its_group_the_newest_gives_way() -> None:
    setup = FakeEngine(blocks=8)
    answers = [setup.add([number] * 6, 12, group=HOG) for number in range(4)]
    setup.step()
    setup.step()
    while setup.scheduler.num_preemptions == 0:
        was = running(setup, answers)
        setup.step()
    assert was == [True] * 4 and running(setup, answers) == [True] * 3 + [False]


def test_nobody_starts_in_a_step_in_which_one_gave_way_for_want_of_blocks() -> None:
    setup = FakeEngine(blocks=4)
    old, new = setup.add([1] * 8, 8, group=HOG), setup.add([2] * 5, 10, group=HOG)
    setup.step()
    small = setup.add([3], 1, group=HOG)
    assert setup.computed() == {old.id: 1}  # one of the four blocks is free
    assert setup.computed() == {old.id: 1, small.id: 1}  # it passes `new`, which does not fit
    assert not setup.is_running(new)


def test_preemptions_are_counted_one_by_one_and_a_prompt_is_looked_up_once() -> None:
    setup = FakeEngine(blocks=8)
    gave_way: list[int] = []
    push_front = setup.scheduler.waiting.push_front
    setup.scheduler.waiting.push_front = lambda it: (gave_way.append(it.id), push_front(it))[1]  # type: ignore[method-assign, func-returns-value]
    for number in range(3):
        setup.add([number] * 9, 12)
    setup.run()
    stats = setup.engine.stats()
    assert len(gave_way) > 1 and stats.preemptions == len(gave_way)
    assert stats.prefix_queries == 27 and stats.prefix_hits == 0


def test_where_one_in_the_middle_gives_way_those_behind_it_are_served() -> None:
    setup = FakeEngine(blocks=8, tokens_per_step=100)
    old = setup.add([1] * 3, 12)
    hogs = [setup.add([2] * 5, 9, group=HOG), setup.add([3] * 13, 9, group=HOG)]
    setup.step()
    behind = setup.add([4], 20)
    setup.step()
    assert running(setup, [old, *hogs, behind]) == [True] * 4 and setup.kv_cache.pool.num_free == 0
    assert setup.computed() == {old.id: 1, hogs[0].id: 1, behind.id: 1}  # `old` began a block


def test_a_group_that_gave_way_for_want_of_blocks_starts_nothing_else_in_that_step() -> None:
    setup = FakeEngine(blocks=12, tokens_per_step=100)
    old = setup.add([1] * 3, 12)
    hogs = [setup.add([2 + number] * length, 9, group=HOG) for number, length in enumerate((13, 5, 13))]
    setup.step()
    behind = setup.add([7], 20)
    setup.step()
    assert running(setup, [old, *hogs, behind]) == [True] * 5 and setup.kv_cache.pool.num_free == 0
    small = setup.add([8], 1, group=HOG)
    served = [old, *hogs[:2], behind]
    assert setup.computed() == {answer.id: 1 for answer in served}  # three blocks are free, and `small` needs one
    assert setup.computed()[small.id] == 1


def test_blocks_beyond_a_share_are_given_up_for_another_group_and_no_more_than_it_needs() -> None:
    setup = FakeEngine(blocks=20, tokens_per_step=100)
    hogs = [setup.add([number] * 16, 4, group=HOG) for number in range(4)]  # 20 blocks with the token that follows
    setup.step()
    setup.step()
    assert running(setup, hogs) == [True] * 4 and setup.kv_cache.pool.num_free == 0
    other = setup.add([9] * 18, 2)  # 5 blocks
    setup.step()
    assert setup.is_running(other) and running(setup, hogs) == [True] * 3 + [False]


@pytest.mark.parametrize("prompt_len", [41, 45])  # it lacks 1 block, or 2, beyond those that may be taken
def test_nothing_is_given_up_where_it_would_not_be_enough(prompt_len: int) -> None:
    setup = FakeEngine(blocks=20, tokens_per_step=100)
    hogs = [setup.add([number] * 16, 4, group=HOG) for number in range(4)]
    setup.step()
    setup.step()
    other = setup.add([9] * prompt_len, 2)
    setup.step()
    assert running(setup, hogs) == [True] * 4 and not setup.is_running(other)


def test_a_token_of_the_budget_is_given_up_for_another_group() -> None:
    setup = FakeEngine(blocks=100, tokens_per_step=2, max_running=3)
    hogs = [setup.add([1], 50, group=HOG), setup.add([2] * 50, 50, group=HOG)]
    setup.step()
    assert running(setup, hogs) == [True, True]
    other = setup.add([3], 5)
    assert setup.computed() == {hogs[0].id: 1, other.id: 1}
    assert running(setup, hogs) == [True, False]


def test_a_group_takes_no_place_that_is_beyond_its_own_share() -> None:
    """Of 8 places and 3 groups each may keep 2."""
    setup = FakeEngine(blocks=100)
    absent = setup.adapter("absent")
    setup.add([1], 50, group=OTHER)
    hogs = [setup.add([number], 50, group=HOG) for number in range(6)]
    setup.step()
    setup.residency.acquire = lambda ref: Wait.LOADING  # type: ignore[method-assign]
    setup.add([2], 1, absent, group=THIRD)
    wide = setup.add([3], 5, group=OTHER, beside=[LaneSpec([4])])
    setup.step()
    assert running(setup, hogs) == [True] * 6 and not setup.is_running(wide)
    narrow = setup.add([5], 5, group=OTHER)
    setup.step()
    assert setup.is_running(narrow)


@pytest.mark.parametrize("num_others", [5, 20])
def test_one_group_may_not_keep_all_blocks_though_more_groups_wait_than_there_are_blocks(num_others: int) -> None:
    setup = FakeEngine(blocks=8, tokens_per_step=100)
    hogs = [setup.add([number] * 13, 4, group=HOG) for number in range(2)]
    setup.step()
    assert setup.kv_cache.pool.num_free == 0
    others = [setup.add([number], 1) for number in range(num_others)]
    setup.step()
    assert running(setup, hogs) == [True, False]
    assert sum(other.finish is not None for other in others) == 4


# -- adapters -----------------------------------------------------------


def test_a_lane_runs_with_the_slot_of_its_adapter_and_gives_it_back() -> None:
    setup = FakeEngine()
    a, b = setup.adapter("a"), setup.adapter("b")
    answer = setup.add([1], 2, a, beside=[LaneSpec([2]), LaneSpec([3], b)])
    plan = setup.step()
    lanes = [scheduled.lane for scheduled in plan]
    assert [lane.slot for lane in lanes] == [1, BASE_SLOT, 2]
    setup.step()
    assert answer.finish is FinishReason.LENGTH and [lane.slot for lane in lanes] == [BASE_SLOT] * 3


def test_a_request_that_must_wait_for_one_of_its_adapters_pins_none() -> None:
    setup = FakeEngine(slots=2)
    a, b, c = (setup.adapter(name) for name in "abc")
    setup.add([1], 30, b)
    setup.step()
    setup.add([2], 30, a, beside=[LaneSpec([2], c)])
    setup.step()
    assert {it.ref: it.pins for it in setup.residency.report()} == {a: 0, b: 1}


class Asked(FakeResidency):
    """One that counts how often each adapter is asked for, and fails to load those that are broken."""

    def __init__(self) -> None:
        super().__init__(4, polls_to_load=1)
        self.asked: list[str] = []
        self.broken: set[str] = set()

    def acquire(self, ref: AdapterRef) -> Any:
        self.asked.append(ref.name)
        if ref.name in self.broken:
            raise AdapterFailed(ref, "the file is gone")
        return super().acquire(ref)


def test_an_absent_adapter_is_asked_for_once_a_step_however_many_wait_for_it() -> None:
    residency = Asked()
    setup = FakeEngine(residency=residency)
    ref = setup.adapter("absent")
    for _ in range(5):
        setup.add([1], 1, ref)
    setup.step()
    assert residency.asked == ["absent"]


def test_adapters_that_fail_in_one_step_end_their_requests_and_let_others_of_their_group_start() -> None:
    residency = Asked()
    residency.broken = {"bad", "worse"}
    setup = FakeEngine(residency=residency)
    good, bad, worse = (setup.adapter(name) for name in ("good", "bad", "worse"))
    failing = [setup.add([1], 1, ref, group=HOG) for ref in (bad, bad, worse, bad)]
    both = setup.add([1], 1, good, beside=[LaneSpec([1], worse)])
    base = setup.add([2], 1, group=HOG)
    setup.step()
    assert base.finish is FinishReason.LENGTH
    for answer, name in zip([*failing, both], ("bad", "bad", "worse", "bad", "worse"), strict=True):
        assert answer.error == f"the adapter {name!r} could not be loaded: the file is gone"
    assert all(it.pins == 0 for it in residency.report())


def test_a_pinned_adapter_comes_unasked_makes_no_room_and_does_so_again_once_it_is_unpinned() -> None:
    setup = FakeEngine(slots=1)
    idle = setup.add([1], 1, setup.adapter("idle"))
    setup.step()
    pinned, other = setup.adapter("pinned", pinned=True), setup.adapter("other")
    setup.step()
    assert idle.finish is FinishReason.LENGTH and [it.ref for it in setup.residency.report()] == [pinned]
    waiting, base = setup.add([2], 1, other), setup.add([3], 1)
    setup.run(10)
    assert waiting.finish is None and base.finish is FinishReason.LENGTH
    assert setup.adapter("pinned") == pinned  # again, and not pinned
    setup.step()
    assert waiting.finish is FinishReason.LENGTH and [it.ref for it in setup.residency.report()] == [other]


def test_one_that_is_removed_is_pinned_no_longer_though_requests_still_wait_for_it() -> None:
    setup = FakeEngine(slots=1, max_running=1)
    pinned, other = setup.adapter("pinned", pinned=True), setup.adapter("other")
    running = setup.add([1], 9, pinned)
    setup.step()
    waiting, starving = setup.add([2], 9, pinned), setup.add([3], 3, other)
    setup.step()
    setup.remove(pinned)
    setup.run(12)
    assert running.finish is starving.finish is FinishReason.LENGTH and waiting.finish is None
    setup.run(12)
    assert waiting.finish is FinishReason.LENGTH


def test_a_pinned_adapter_waits_until_those_in_use_make_room() -> None:
    setup = FakeEngine(slots=1)
    used = setup.add([1], 5, setup.adapter("used"))
    setup.step()
    pinned = setup.adapter("pinned", pinned=True)
    for _ in range(4):
        assert [it.ref for it in setup.residency.report()] == [used.adapter]
        setup.step()
    assert used.finish is FinishReason.LENGTH
    setup.step()
    assert [it.ref for it in setup.residency.report()] == [pinned]
    setup.remove(pinned)
    setup.step()
    assert setup.residency.report() == ()


# -- ends -----------------------------------------------------------


class Failing(FakeRunner):
    """It cannot say what comes after a prompt of two."""

    def launch(self, plan: Plan) -> Known:
        said = super().launch(plan).outputs()
        return Known({lane: Output(error="not a number") if lane.prompt_len == 2 else it for lane, it in said.items()})


def test_a_request_whose_output_is_an_error_ends_with_it_and_the_others_go_on() -> None:
    setup = FakeEngine(runner=Failing(50, BLOCK))
    bad, good = setup.add([1, 2], 3), setup.add([1], 3)
    setup.run(4)
    assert (bad.finish, bad.error, bad.tokens) == (FinishReason.ERROR, "not a number", [])
    assert good.finish is FinishReason.LENGTH and len(good.tokens) == 3
    assert setup.is_done and setup.kv_cache.pool.num_free == 50


def test_as_many_wait_as_are_allowed() -> None:
    setup = FakeEngine(max_waiting=2)
    answers = [setup.add([1], 1) for _ in range(3)]
    setup.step()
    assert [answer.error for answer in answers] == [None, None, "2 requests are waiting, as many as are allowed"]


def test_its_check_finds_a_request_that_has_nothing_to_compute() -> None:
    setup = FakeEngine()
    answer = setup.add([1], 5)
    setup.step()
    request = setup.request(answer)
    assert request is not None
    request.first.num_computed_tokens += 1
    with pytest.raises(AssertionError):
        setup.scheduler.check()
