"""Requests that wait for the same adapters, and take turns by group.

A group is the requests of one HTTP request: several prompts, or several completions of one. Without turns, whoever
sends a thousand completions at once is served a thousand times before the next client is served once.

Turns are dealt by stride scheduling (Waldspurger and Weihl, 1995): a group has a *pass*, a turn adds 1 / weight to it,
and the smallest pass is next. So a group has turns in proportion to its weight, and with equal weights one after
another.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count

from adapters_store.ref import AdapterRef
from server.engine.request import Group, Request

# pass, number among equal passes, group: the smallest is next
_Turn = tuple[float, int, Group]


class _Members:
    """A group that has requests waiting, in the order of service. All have its weight."""

    def __init__(self, first: Request) -> None:
        self.stride = 1 / first.weight
        self.turn: _Turn = (0.0, 0, first.group)
        self.requests: OrderedDict[int, Request] = OrderedDict()


class Line:
    """Groups in the order of their turns; the requests of a group in the order of service.

    a: 1 2 3
    b: 4          order: 1 4 5 2 6 3, and once 1 is taken, a's turn comes last: 4 5 2 6 3
    c: 5 6

    If a had three times the weight of the others: 1 2 4 5 3 6.
    """

    def __init__(self, account: str, adapters: tuple[AdapterRef, ...]) -> None:
        """account: the name whose tokens are counted. adapters: what each of its requests needs on the device."""
        self.account, self.adapters = account, adapters
        self.served_in = 0  # the step in which one of it started last, or the first in which one could have
        self._groups: dict[Group, _Members] = {}
        self._turns: list[_Turn] = []  # of all groups, sorted
        self._passed = 0.0  # the largest pass that had its turn
        self._last, self._first = count(), count(-1, -1)  # numbers
        self._length = 0

    def push(self, request: Request) -> None:
        """Behind what waits: last in its group. A group that had nothing waiting starts one stride behind the turn that
        was dealt last, so that nobody saves up turns by staying away."""
        group = self._groups.get(request.group)
        if group is None:
            group = self._groups[request.group] = _Members(request)
            self._deal(request.group, self._passed + group.stride)
        group.requests[request.id] = request
        self._length += 1

    def push_front(self, request: Request) -> None:
        """One that ran already and gave way: first in its group, whose turn is the first unless it had one."""
        group = self._groups.get(request.group)
        if group is None:
            group = self._groups[request.group] = _Members(request)
            first = min(self._passed, self._turns[0][0]) if self._turns else self._passed
            group.turn = (first, next(self._first), request.group)
            insort(self._turns, group.turn)
        group.requests[request.id] = request
        group.requests.move_to_end(request.id, last=False)
        self._length += 1

    def remove(self, request: Request) -> None:
        """It waits no longer, and its group keeps its turn."""
        group = self._groups[request.group]
        del group.requests[request.id]
        if not group.requests:
            self._withdraw(group)
            del self._groups[request.group]
        self._length -= 1

    def charge(self, group: Group) -> None:
        """The group has its turn. To be said before the request is removed, else the turn of one that leaves with it is
        forgotten."""
        members = self._groups.get(group)
        if members is not None:
            # no less than was dealt to others: one that had to be passed over saves up no turns either
            self._passed = max(members.turn[0], self._passed)
            self._withdraw(members)
            self._deal(group, self._passed + members.stride)

    def order(self, leaves_out: Callable[[Group], bool]) -> Iterator[Request]:
        """Requests in order of service; nobody who waits now is missed, but for groups that are left out, which is
        asked whenever one's turn comes. Some may have left when they come up: look at their status. Copies are made as
        they are needed, since most steps look at the first few only."""
        passed, numbers = self._passed, count(next(self._last))
        again: list[_Turn] = []
        left: dict[Group, tuple[list[Request], float]] = {}  # the last first, and the stride
        for own, _, name in _merged(self._turns.copy(), again):
            if leaves_out(name):
                continue
            if name not in left:
                if name not in self._groups:
                    continue
                group = self._groups[name]
                left[name] = list(reversed(group.requests.values())), group.stride
            requests, stride = left[name]
            yield requests.pop()
            passed = max(own, passed)
            if requests:
                heappush(again, (passed + stride, next(numbers), name))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """In no order that matters."""
        return (request for group in self._groups.values() for request in group.requests.values())

    # -- turns -----------------------------------------------------------

    def _deal(self, name: Group, to: float) -> None:
        """A turn at this pass, behind those of the same pass."""
        group = self._groups[name]
        group.turn = (to, next(self._last), name)
        insort(self._turns, group.turn)

    def _withdraw(self, group: _Members) -> None:
        del self._turns[bisect_left(self._turns, group.turn)]

    def check(self) -> None:
        assert self._length == sum(len(group.requests) for group in self._groups.values())
        assert self._turns == sorted(group.turn for group in self._groups.values())
        for name, group in self._groups.items():
            assert group.turn[2] == name
            # nobody is further behind than one turn: so a group waits for a bounded number of others' turns
            assert group.turn[0] <= self._passed + group.stride
            assert group.requests
            for key, request in group.requests.items():
                assert request.group == name and request.id == key
                assert 1 / request.weight == group.stride
                assert (request.account, tuple(request.adapters)) == (self.account, self.adapters)


def _merged(turns: list[_Turn], again: list[_Turn]) -> Iterator[_Turn]:
    """Both in order. `turns` is sorted; `again` is a heap, to which more may come between: most groups are one request,
    and never come to it."""
    for turn in turns:
        while again and again[0] < turn:
            yield heappop(again)
        yield turn
    while again:
        yield heappop(again)
