"""The order of service: by priority, tokens of the adapter, turns of groups, arrival."""

import random
from collections import Counter
from collections.abc import Iterable
from itertools import islice

import pytest

from adapters_store.ref import AdapterRef
from server.engine.queue import WaitingQueue
from server.engine.request import Group, LaneSpec, Request, Sampling
from server.engine.token_counters import TokenCounters
from tests.support.breadth import always

A, B, C = 100, 200, 300
PATIENCE = 30.0


def queue() -> WaitingQueue:
    return WaitingQueue(TokenCounters(), PATIENCE)


def ref(name: str) -> AdapterRef:
    return AdapterRef(name, name, "lora")


def request(
    number: int, group: Group, weight: float = 1.0, priority: int = 0, adapter: str = "", arrived: float = 0.0
) -> Request:
    lanes = [LaneSpec([1], ref(adapter) if adapter else None)]
    return Request(number, lanes, 9, Sampling(), group=group, weight=weight, priority=priority, arrived=arrived)


def numbers(requests: Iterable[Request]) -> list[int]:
    return [it.id for it in requests]


def example(weight_of_a: float = 1.0, priority_of_c: int = 0) -> tuple[WaitingQueue, dict[int, Request]]:
    """The one of its docstring."""
    waiting, requests = queue(), {}
    for number, group in ((1, A), (4, B), (2, A), (5, C), (3, A), (6, C)):
        weight, priority = weight_of_a if group == A else 1.0, priority_of_c if group == C else 0
        requests[number] = request(number, group, weight, priority)
        waiting.push(requests[number])
        waiting.check()
    return waiting, requests


def test_groups_take_turns_and_the_requests_of_one_come_as_they_came() -> None:
    waiting, _ = example()
    assert numbers(waiting.order()) == [1, 4, 5, 2, 6, 3]
    assert numbers(queue().order()) == []
    assert numbers(example(weight_of_a=3.0)[0].order()) == [1, 2, 4, 5, 3, 6]
    assert numbers(example(priority_of_c=1)[0].order()) == [5, 6, 1, 4, 2, 3]


def test_the_turn_of_a_group_that_was_served_comes_last() -> None:
    waiting, requests = example()
    waiting.remove(requests[1])
    assert numbers(waiting.order()) == [2, 4, 5, 3, 6]  # one that was only removed had no turn
    waiting.charge(requests[2])
    assert numbers(waiting.order()) == [4, 5, 2, 6, 3]
    waiting.remove(requests[4])
    assert numbers(waiting.order()) == [5, 2, 6, 3]
    waiting.push(request(7, B))
    assert numbers(waiting.order()) == [5, 2, 7, 6, 3]
    waiting.check()


def test_one_that_gave_way_is_first_of_its_group_and_its_group_keeps_its_turn() -> None:
    waiting, _ = example()
    waiting.push_front(request(7, C))
    assert numbers(waiting.order()) == [1, 4, 7, 2, 5, 3, 6]
    assert len(waiting) == 7
    waiting.check()


def test_one_that_gave_way_and_is_alone_of_its_group_is_the_very_first() -> None:
    waiting, _ = example()
    waiting.push_front(request(7, 400))
    assert numbers(waiting.order()) == [7, 1, 4, 5, 2, 6, 3]
    assert len(waiting) == 7
    waiting.check()


def test_what_leaves_while_the_order_is_read_hides_nobody_who_waits() -> None:
    waiting, requests = example()
    order = waiting.order()
    assert next(order).id == 1
    for number in (1, 4, 2):  # the whole of b among them
        waiting.remove(requests[number])
    left = numbers(order)
    assert [number for number in left if requests[number] in waiting] == [5, 6, 3]
    assert len(left) == len(set(left))


def take(waiting: WaitingQueue) -> Request:
    """Serve the next one."""
    it = next(waiting.order())
    waiting.charge(it)
    waiting.remove(it)
    waiting.check()
    return it


@pytest.mark.parametrize("arriving", ["all at once", "one at a time"])
def test_groups_have_turns_in_proportion_to_their_weights(arriving: str) -> None:
    weights = {A: 1.0, B: 2.0, C: 0.5}
    waiting, served = queue(), Counter[Group]()
    for number in range(3000):
        group = (A, B, C)[number % 3]
        if arriving == "all at once" or number < 3:
            waiting.push(request(number, group, weights[group]))
    planned = Counter(it.group for it in islice(waiting.order(), 700))
    for number in range(700):
        it = take(waiting)
        served[it.group] += 1
        if arriving == "one at a time":
            waiting.push(request(10_000 + number, it.group, it.weight))
    if arriving == "all at once":
        assert served == planned == {A: 200, B: 400, C: 100}
    else:  # a group that leaves with its only request and comes again has lost nothing, and won nothing
        assert all(abs(served[group] - weight * 200) < 3 for group, weight in weights.items())


def test_groups_of_one_request_each_are_not_starved_by_others_of_more_weight() -> None:
    waiting = queue()
    waiting.push(request(0, 0, weight=0.25))
    for number in range(1, 100):
        waiting.push(request(number, number, weight=1.0))
        if take(waiting).id == 0:
            break
    assert number in (4, 5)


def test_nobody_saves_up_turns() -> None:
    waiting = queue()
    for number in range(50):
        waiting.push(request(number, A))
        waiting.push(request(100 + number, B))
    waiting.push(request(200, C))
    passed_over = next(it for it in waiting if it.group == C)
    for _ in range(40):  # c cannot be served, its adapter is loading, say
        it = next(it for it in waiting.order() if it.group != C)
        waiting.charge(it)
        waiting.remove(it)
    assert next(waiting.order()) is passed_over
    for number in (201, 202, 203):
        waiting.push(request(number, C))
        waiting.push(request(number + 100, 999))  # and one that comes only now
    assert [it.group for it in islice(waiting.order(), 8)] == [C, A, B, 999] * 2


def test_priority_comes_before_turns_and_is_no_matter_of_share() -> None:
    waiting = queue()
    for number in range(3):
        waiting.push(request(number, A, weight=100.0))
        waiting.push(request(10 + number, B, weight=0.1, priority=1))
        waiting.push(request(20 + number, C, priority=-1))
    waiting.push_front(request(30, 400, priority=-1))
    waiting.push_front(request(31, 500, priority=1))
    assert numbers(waiting.order()) == [31, 10, 11, 12, 0, 1, 2, 30, 20, 21, 22]
    assert [take(waiting).id for _ in range(len(waiting))] == [31, 10, 11, 12, 0, 1, 2, 30, 20, 21, 22]


class Rotation:
    """What turns of equal weights are: a list that is rotated."""

    def __init__(self) -> None:
        self.groups: dict[Group, list[int]] = {}

    def order(self) -> list[int]:
        longest = max(map(len, self.groups.values()), default=0)
        return [group[turn] for turn in range(longest) for group in self.groups.values() if turn < len(group)]

    def charge(self, group: Group) -> None:
        if group in self.groups:
            self.groups[group] = self.groups.pop(group)

    def remove(self, number: int, group: Group) -> None:
        self.groups[group].remove(number)
        if not self.groups[group]:
            del self.groups[group]

    def push_front(self, number: int, group: Group) -> None:
        if group in self.groups:
            self.groups[group].insert(0, number)
        else:
            self.groups = {group: [number], **self.groups}


@pytest.mark.parametrize("weight", [1.0, 0.3, 7.0])
@pytest.mark.parametrize("seed", always(range(5), 0))
def test_with_equal_weights_turns_are_a_rotation(weight: float, seed: int) -> None:
    rng, waiting, rotation = random.Random(seed), queue(), Rotation()
    there: dict[int, Request] = {}
    for number in range(2000):
        it = request(number, rng.randrange(12), weight)
        match rng.randrange(6):
            case 0 | 1:
                waiting.push(it)
                rotation.groups.setdefault(it.group, []).append(number)
                there[number] = it
            case 2 if rng.random() < 0.5:
                waiting.push_front(it)
                rotation.push_front(number, it.group)
                there[number] = it
            case 3 if there:  # served, and not always the first: others may be waiting for their adapters
                it = rng.choice(list(islice(waiting.order(), 4)))
                waiting.charge(it)
                rotation.charge(it.group)
                waiting.remove(it)
                rotation.remove(it.id, it.group)
                del there[it.id]
            case 4 if there:
                it = there.pop(rng.choice(list(there)))
                waiting.remove(it)
                rotation.remove(it.id, it.group)
        waiting.check()
        assert numbers(waiting.order()) == rotation.order()


def test_it_knows_whether_others_wait() -> None:
    waiting = queue()
    assert not waiting.has_others(A)
    first = request(1, A)
    waiting.push(first)
    assert not waiting.has_others(A) and waiting.has_others(B)
    waiting.push(request(2, B))
    assert waiting.has_others(A) and waiting.has_others(B)
    waiting.remove(first)
    assert waiting.has_others(A) and not waiting.has_others(B)


def test_it_holds_what_was_pushed_and_not_removed() -> None:
    waiting, requests = example()
    assert len(waiting) == 6 and sorted(numbers(waiting)) == [1, 2, 3, 4, 5, 6]
    waiting.remove(requests[2])
    waiting.remove(requests[4])
    assert len(waiting) == 4 and sorted(numbers(waiting)) == [1, 3, 5, 6]
    assert requests[1] in waiting and requests[2] not in waiting and requests[4] not in waiting
    waiting.check()


def test_its_check_finds_what_does_not_belong() -> None:
    waiting, requests = example()
    waiting.line(requests[1])._length += 1
    with pytest.raises(AssertionError):
        waiting.check()

    waiting, requests = example()
    waiting._groups[B] += 1
    with pytest.raises(AssertionError):
        waiting.check()

    waiting, requests = example()
    del waiting._young[5]
    with pytest.raises(AssertionError):
        waiting.check()

    for what, other in (("group", B), ("id", 9), ("priority", 1), ("account", "other")):
        waiting, requests = example()
        setattr(requests[2], what, other)
        with pytest.raises(AssertionError):
            waiting.check()


# -- adapters -----------------------------------------------------------


def serve(waiting: WaitingQueue, counters: TokenCounters, num_tokens: int) -> str:
    """The next one, and what it generates."""
    it = take(waiting)
    counters.charge_generated(it, num_tokens)
    return it.account


def filled(weights: dict[str, float], each: int) -> tuple[WaitingQueue, TokenCounters]:
    counters = TokenCounters()
    waiting = WaitingQueue(counters, PATIENCE)
    for name, weight in weights.items():
        for number in range(each):
            number += 1000 * ord(name[-1])
            waiting.push(request(number, number, weight, adapter=name))
    return waiting, counters


def test_the_adapter_that_had_the_fewest_tokens_is_next_however_many_groups_others_have() -> None:
    waiting, counters = filled({"a": 1.0}, 50)
    waiting.push(request(1, 1, adapter="b"))
    waiting.push(request(2, 1, adapter="b"))
    waiting.push(request(3, 3))  # the base is one among them
    assert [serve(waiting, counters, 1) for _ in range(7)] == ["a", "b", "", "a", "b", "a", "a"]


def test_adapters_are_served_in_proportion_to_their_weights_whatever_a_request_takes() -> None:
    weights, tokens = {"a": 1.0, "b": 2.0, "c": 0.5}, {"a": 50, "b": 3, "c": 11}
    waiting, counters = filled(weights, 400)
    served: Counter[str] = Counter()
    for _ in range(400):
        it = next(waiting.order())
        waiting.charge(it)
        waiting.remove(it)
        counters.charge_generated(it, tokens[it.account])
        served[it.account] += tokens[it.account]
        per_weight = [served[name] / weight for name, weight in weights.items()]
        assert max(per_weight) - min(per_weight) <= 50
    assert min(served.values()) > 200


def test_what_is_charged_while_the_order_is_read_counts_at_once() -> None:
    waiting, counters = filled({"a": 1.0, "b": 1.0}, 4)
    seen = []
    for it in waiting.order():
        seen.append(it.account)
        counters.charge_generated(it, 1 if it.account == "a" else 3)
    assert seen == ["a", "b", "a", "a", "b", "a", "b", "b"]  # 2 and 6 each; of equals the one that waited longer


def test_two_names_of_the_same_weights_are_two_adapters_and_one_line_is_of_one_need() -> None:
    waiting = queue()
    both = [AdapterRef(name, "weights", "lora") for name in ("a", "b")]
    asked = [Request(number, [LaneSpec([1], it)], 1, Sampling()) for number, it in enumerate([*both, both[0]])]
    asked.append(Request(3, [LaneSpec([1], both[0]), LaneSpec([1], ref("c"))], 1, Sampling()))
    for it in asked:
        waiting.push(it)
    lines = [waiting.line(it) for it in asked]
    assert lines[0] is lines[2] and len({*lines}) == 3
    assert [it.account for it in asked] == ["a", "b", "a", "a"]


def test_a_line_or_a_group_that_is_left_out_does_not_come_up_again() -> None:
    waiting = queue()
    for number, (group, adapter) in enumerate([(A, "a"), (B, "a"), (A, "a"), (C, "b"), (C, "b"), (A, "c")]):
        waiting.push(request(number, group, adapter=adapter))
    assert numbers(waiting.order_of(list(waiting.lines()), lambda line, group: group == A)) == [1, 3, 4]
    assert numbers(
        waiting.order_of(list(waiting.lines()), lambda line, group: group is None and line.account == "b")
    ) == [0, 1, 2, 5]
    seen = set[str]()
    first_of_each = []
    for it in waiting.order_of(list(waiting.lines()), lambda line, group: line.account in seen):
        first_of_each.append(it.id)
        seen.add(it.account)
    assert first_of_each == [0, 3, 5]
    lines = [it for it in waiting.lines() if it.account != "b"]
    assert numbers(waiting.order_of(lines)) == [0, 1, 2, 5]


# -- age -----------------------------------------------------------


def test_one_of_a_low_priority_that_has_waited_for_long_takes_turns_with_the_highest() -> None:
    counters = TokenCounters()
    waiting = WaitingQueue(counters, PATIENCE)
    waiting.push(request(1, 1, priority=-5, adapter="low", arrived=0.0))
    waiting.push(request(2, 2, priority=-5, adapter="low", arrived=5.0))
    for number in range(10, 20):
        waiting.push(request(number, number, priority=3, adapter="high"))
    for number in (30, 31):
        waiting.push(request(number, number, adapter="middle", arrived=PATIENCE))
    waiting.begin_step(PATIENCE)
    assert numbers(waiting.order())[:10] == list(range(10, 20))
    waiting.begin_step(PATIENCE + 1)
    waiting.check()
    assert [serve(waiting, counters, 1) for _ in range(3)] == ["low", "high", "high"]
    waiting.push_front(request(1, 1, priority=-5, adapter="low", arrived=0.0))  # it gave way
    waiting.begin_step(PATIENCE + 10)
    waiting.check()
    served = [serve(waiting, counters, 1) for _ in range(11)]
    assert served[:4].count("low") == 2 and served[10:] == ["middle"]
    for number in range(40, 50):
        waiting.push(request(number, number, priority=9, adapter="higher", arrived=PATIENCE + 10))
    assert "middle" not in [it.account for it in islice(waiting.order(), 10)]
    waiting.begin_step(2 * PATIENCE + 1)
    waiting.check()
    assert "middle" in [serve(waiting, counters, 1) for _ in range(3)]


def test_without_a_clock_priority_is_for_ever_and_where_all_have_the_same_nobody_grows_old() -> None:
    waiting = queue()
    waiting.push(request(1, 1, priority=-5))
    waiting.push(request(2, 2))
    waiting.begin_step(0.0)
    assert numbers(waiting.order()) == [2, 1]
    waiting.remove(next(waiting.order()))
    waiting.begin_step(10 * PATIENCE)
    assert waiting._young  # it is not moved for nothing
    waiting.check()


def test_many_that_grow_old_at_once_are_moved_a_few_in_a_step_and_keep_their_order() -> None:
    waiting = queue()
    for number in range(100):
        waiting.push(request(number, number, priority=-1))
    waiting.push(request(200, 200, arrived=PATIENCE))
    waiting.begin_step(PATIENCE + 1)
    waiting.check()
    assert len(waiting._young) == 101 - 64
    waiting.begin_step(PATIENCE + 1)
    waiting.check()
    assert numbers(waiting.order())[:3] == [0, 1, 2] and len(waiting) == 101


def test_it_knows_which_lines_were_not_served_for_long() -> None:
    waiting = queue()
    there = [request(number, number, adapter="abc"[number % 3]) for number in range(6)]
    for it in there:
        waiting.push(it)
    waiting.push(request(9, 9))  # the base needs no room
    for step in range(5):
        waiting.begin_step(0.0)
        if step == 2:
            waiting.charge(there[0])
            waiting.remove(there[0])
    assert [it.account for it in waiting.unserved(3)] == ["b", "c"]
    assert [it.account for it in waiting.unserved(1)] == ["b", "c", "a"]
    assert list(waiting.unserved(4)) == []
