"""The order in which waiting requests are served: round over groups, by arrival within one.

A group is the requests of one HTTP request: several prompts, or several completions of one. Without rounds, whoever
sends a thousand completions at once is served a thousand times before the next client is served once.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import islice

from server.engine.request import Group, Request


class WaitingQueue:
    """Groups in the order of their turns; the requests of a group in the order of service.

    a: 1 2 3
    b: 4          order: 1 4 5 2 6 3, and once 1 is taken, a's turn comes last: 4 5 2 6 3
    c: 5 6
    """

    def __init__(self) -> None:
        self._groups: OrderedDict[Group, OrderedDict[int, Request]] = OrderedDict()
        self._length = 0

    def push(self, request: Request) -> None:
        """Behind what waits: last in its group, and a group that had nothing waiting gets its turn last."""
        self._group(request)[request.id] = request
        self._length += 1

    def push_front(self, request: Request) -> None:
        """One that ran already and gave way: first in its group, whose turn comes first unless it had one."""
        is_new = request.group not in self._groups
        group = self._group(request)
        group[request.id] = request
        group.move_to_end(request.id, last=False)
        if is_new:
            self._groups.move_to_end(request.group, last=False)
        self._length += 1

    def remove(self, request: Request) -> None:
        """It waits no longer, and its group keeps its turn."""
        group = self._groups[request.group]
        del group[request.id]
        if not group:
            del self._groups[request.group]
        self._length -= 1

    def charge(self, group: Group) -> None:
        """The group has had its turn."""
        if group in self._groups:
            self._groups.move_to_end(group)

    def order(self) -> Iterator[Request]:
        """Requests in order of service; nobody who waits now is missed. Some may have left when they come up: look at
        their status. Copies are made as they are needed, since most steps look at the first few only."""
        turns: deque[Iterator[Request]] = deque()
        for name in tuple(self._groups):
            members = iter(tuple(self._groups.get(name, {}).values()))
            turns.append(members)
            yield from islice(members, 1)
        while turns:
            members = turns.popleft()
            request = next(members, None)
            if request is not None:
                yield request
                turns.append(members)

    def has_others(self, group: Group) -> bool:
        """Whether requests of another group wait."""
        return len(self._groups) > (group in self._groups)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """In no order that matters."""
        return (request for group in self._groups.values() for request in group.values())

    def __contains__(self, request: Request) -> bool:
        return request.id in self._groups.get(request.group, ())

    def _group(self, request: Request) -> OrderedDict[int, Request]:
        return self._groups.setdefault(request.group, OrderedDict())

    def check(self) -> None:
        assert self._length == sum(len(group) for group in self._groups.values())
        for name, group in self._groups.items():
            assert group and all(request.group == name and request.id == key for key, request in group.items())
