"""The order of service: round over groups, by arrival within one."""

from collections.abc import Iterable

import pytest

from server.engine.queue import WaitingQueue
from server.engine.request import Group, LaneSpec, Request, Sampling

A, B, C = 100, 200, 300


def request(number: int, group: Group) -> Request:
    return Request(number, [LaneSpec([1])], 1, Sampling(), group=group)


def numbers(requests: Iterable[Request]) -> list[int]:
    return [it.id for it in requests]


def example() -> tuple[WaitingQueue, dict[int, Request]]:
    """The one of its docstring."""
    waiting, requests = WaitingQueue(), {}
    for number, group in ((1, A), (4, B), (2, A), (5, C), (3, A), (6, C)):
        requests[number] = request(number, group)
        waiting.push(requests[number])
        waiting.check()
    return waiting, requests


def test_groups_take_turns_and_the_requests_of_one_come_as_they_came() -> None:
    waiting, _ = example()
    assert numbers(waiting.order()) == [1, 4, 5, 2, 6, 3]
    assert numbers(WaitingQueue().order()) == []


def test_the_turn_of_a_group_that_was_served_comes_last() -> None:
    waiting, requests = example()
    waiting.remove(requests[1])
    assert numbers(waiting.order()) == [2, 4, 5, 3, 6]  # one that was only removed had no turn
    waiting.charge(A)
    assert numbers(waiting.order()) == [4, 5, 2, 6, 3]
    waiting.remove(requests[4])
    waiting.charge(B)  # nothing of it is left
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


def test_it_knows_whether_others_wait() -> None:
    waiting = WaitingQueue()
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
    waiting._length += 1
    with pytest.raises(AssertionError):
        waiting.check()

    waiting, requests = example()
    waiting._groups[400] = waiting._groups[A].__class__()
    with pytest.raises(AssertionError):
        waiting.check()

    waiting, requests = example()
    requests[2].group = B
    with pytest.raises(AssertionError):
        waiting.check()

    waiting, requests = example()
    requests[2].id = 9
    with pytest.raises(AssertionError):
        waiting.check()
