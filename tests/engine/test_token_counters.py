"""How tokens are counted, and that nobody saves up or runs away from what it had."""

import pytest

from adapters_store.ref import AdapterRef
from server.engine.at_work import AtWork
from server.engine.request import LaneSpec, Request, Sampling
from server.engine.token_counters import MOST_REMEMBERED, TokenCounters


def request(name: str, length: int = 10, weight: float = 1.0, lanes: int = 1, group: int = 0) -> Request:
    ref = AdapterRef(name, name, "lora") if name else None
    return Request(0, [LaneSpec([1] * length, ref)] * lanes, 5, Sampling(), weight=weight, group=group)


def counters(*names: str) -> TokenCounters:
    it = TokenCounters()
    for name in names:
        it.come(name)
    return it


def test_tokens_of_prompts_count_once_and_generated_ones_twice_by_weight() -> None:
    it, one = counters("a"), request("a", weight=2.0)
    it.charge_prompt(one.first, 4)
    assert it.of("a") == 2.0
    one.first.num_computed_tokens = 4
    it.charge_prompt(one.first, 9)  # three of them are generated ones that are computed
    assert it.of("a") == 5.0
    one.first.num_computed_tokens = 0  # it gave way
    it.charge_prompt(one.first, 10)
    assert it.of("a") == 5.0
    it.charge_generated(one, 3)
    assert it.of("a") == 8.0
    it.charge_generated(request("a", lanes=2), 1)
    assert it.of("a") == 12.0


def test_what_the_prefix_cache_knew_is_not_charged() -> None:
    it, one = counters(""), request("")
    one.first.num_computed_tokens = 8
    it.charge_prompt(one.first, 2)
    assert it.of("") == 2.0


def test_who_comes_is_lifted_to_whoever_was_chosen_last_and_keeps_what_is_more() -> None:
    it = counters("a", "b")
    it.charge_generated(request("a"), 50)
    it.choose("a")
    it.come("late")
    assert it.of("late") == 100.0
    assert it.of("b") == 0.0  # it waits
    it.choose("b")  # passed over till now
    assert it.of("b") == 100.0
    it.charge_generated(request("b"), 50)
    it.come("b")
    assert it.of("b") == 200.0


def test_who_leaves_and_comes_back_starts_where_it_was_until_others_have_had_as_much() -> None:
    it = counters("a", "b")
    it.charge_generated(request("b"), 50)
    it.leave("b")
    it.settle({"a"})
    it.check({"a"})
    it.come("b")
    assert it.of("b") == 100.0
    it.leave("b")
    it.charge_generated(request("a"), 60)
    it.choose("a")
    it.settle({"a"})
    it.check({"a"})
    with pytest.raises(KeyError):
        it.of("b")
    it.come("b")
    assert it.of("b") == 120.0


def test_with_nobody_at_work_all_is_forgotten() -> None:
    it = counters("a")
    it.charge_generated(request("a"), 50)
    it.choose("a")
    it.leave("a")
    it.settle(())
    it.check(())
    it.come("b")
    assert it.of("b") == 0.0


def test_so_many_that_left_are_remembered_and_no_more() -> None:
    it = counters("stays")
    for number in range(3 * MOST_REMEMBERED):
        it.come(str(number))
        it.charge_generated(request(str(number)), number + 1)
        it.leave(str(number))
        it.settle({"stays"})
    it.check({"stays"})
    assert len(it._counters) == MOST_REMEMBERED + 1
    assert it.of(str(3 * MOST_REMEMBERED - 1))  # those that are furthest ahead
    with pytest.raises(KeyError):
        it.of("0")


def test_its_check_finds_a_counter_that_nobody_needs() -> None:
    it = counters("a", "b")
    with pytest.raises(AssertionError):
        it.check({"a"})
    with pytest.raises(AssertionError):
        counters("a").check({"a", "b"})


def test_who_is_at_work_is_counted_by_adapter_and_group_with_the_latest_weight() -> None:
    it = AtWork()
    there = [request("a", group=1), request("a", weight=3.0, group=2), request("", group=1), request("a", group=2)]
    for one in there[:3]:
        it.add(one)
    it.check(there[:3])
    assert it.weights == {"a": 3.0, "": 1.0} and (it.num_groups("a"), it.num_groups(""), it.num_groups("x")) == (
        2,
        1,
        0,
    )
    it.add(there[3])
    assert it.weights["a"] == 1.0
    assert [it.remove(one) for one in there] == [False, False, True, True]
    assert not it.weights
    with pytest.raises(AssertionError):
        it.check(there)
