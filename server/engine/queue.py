"""The order in which waiting requests are served: by priority, then those first whose adapter had the fewest tokens,
then in turns of groups, then by arrival.

An adapter's tokens are counted under the name that requests gave (token_counters.py). Requests that need the same
adapters stand in one line (lines.py), in which groups take turns: what holds for one of a line, that its adapter is not
on the device, say, holds for all, so nobody need look at the others.

Priority has a limit: one that has waited for `patience_s` seconds counts as of the highest priority that waits, and is
among those of it where its adapter's tokens put it. So whoever sends requests of a high priority without end delays the
others, and does not starve them. The limit is in seconds, not in steps, since it says what a priority is worth to
people; where steps are told of no clock, priority is for ever.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from itertools import count, islice, takewhile

from adapters_store.ref import AdapterRef
from server.engine.lines import Line
from server.engine.request import Group, Request
from server.engine.token_counters import TokenCounters

_Level = int  # -priority: the smallest is first
_AGED: _Level = -(1 << 62)  # of those that have waited for long, who stand beside the first of the others
_MOST_AGED = 64  # in one step: many may come of age at once
_Key = tuple[str, tuple[AdapterRef, ...]]


def _nobody(line: Line, group: Group | None) -> bool:
    return False


class WaitingQueue:
    def __init__(self, counters: TokenCounters, patience_s: float) -> None:
        self._counters, self._patience_s = counters, patience_s
        self._levels: dict[_Level, dict[_Key, Line]] = {}
        self._places: dict[int, tuple[_Level, Line]] = {}  # of each request
        self._lines_of: Counter[str] = Counter()  # by account
        self._groups: Counter[Group] = Counter()
        self._owns: Counter[_Level] = Counter()  # requests by the level that is their own, old or not
        self._young: OrderedDict[int, Request] = OrderedDict()  # in about the order of arrival
        self._unserved: OrderedDict[Line, None] = OrderedDict()  # those with adapters, the longest unserved first
        self.num_steps = 0
        self.num_changes = 0  # since the start: whoever remembers an order can see that it is the same

    def push(self, request: Request) -> None:
        """Behind what waits: last in its group."""
        self._enter(request, -request.priority).push(request)
        self._young[request.id] = request

    def push_front(self, request: Request) -> None:
        """One that ran already and gave way: first in its group."""
        self._enter(request, -request.priority).push_front(request)
        self._young[request.id] = request
        self._young.move_to_end(request.id, last=False)

    def remove(self, request: Request) -> None:
        """It waits no longer, and its group keeps its turn."""
        level, line = self._places.pop(request.id)
        line.remove(request)
        self._young.pop(request.id, None)
        for counted, key in ((self._groups, request.group), (self._owns, -request.priority)):
            counted[key] -= 1
            if not counted[key]:
                del counted[key]
        if not line:
            del self._levels[level][line.account, line.adapters]
            self._unserved.pop(line, None)
            if not self._levels[level]:
                del self._levels[level]
            self._lines_of[line.account] -= 1
            if not self._lines_of[line.account]:
                del self._lines_of[line.account]
        self.num_changes += 1

    def charge(self, request: Request) -> None:
        """Its group and its adapter have their turn. To be said before it is removed."""
        _, line = self._places[request.id]
        line.charge(request.group)
        self._counters.choose(line.account)
        line.served_in = self.num_steps
        if line in self._unserved:
            self._unserved.move_to_end(line)

    def begin_step(self, now: float) -> None:
        """Those that have waited for long come among the first. now: seconds."""
        self.num_steps += 1
        if len(self._levels) < 2:  # nobody is before anybody
            return
        for request in list(islice(self._young.values(), _MOST_AGED)):
            if now - request.arrived <= self._patience_s:
                break
            served_in = self.line(request).served_in
            self._lines_of[request.account] += 1  # it does not leave meanwhile, else it would lose its counter
            self.remove(request)
            line = self._enter(request, _AGED)
            self._lines_of[request.account] -= 1
            line.push(request)
            if served_in < line.served_in and line in self._unserved:
                line.served_in = served_in
                self._unserved.move_to_end(line, last=False)

    def unserved(self, num_steps: int) -> Iterator[Line]:
        """Lines with adapters of which nothing started in more than so many steps, the longest first."""
        return takewhile(lambda line: self.num_steps - line.served_in > num_steps, self._unserved)

    def order(self) -> Iterator[Request]:
        """Requests in order of service, as counters are when they come up. Some may have left by then: look at their
        status."""
        for lines in self.by_level():
            yield from self.order_of(lines)

    def order_of(
        self, lines: Iterable[Line], leaves_out: Callable[[Line, Group | None], bool] = _nobody
    ) -> Iterator[Request]:
        """The same, of some lines of one level. `leaves_out` is asked of a line, without a group, before each of its
        requests, and of a group when its turn comes; what it leaves out does not come up again.

        A line comes up for as long as nothing is charged to it, then when it is its turn again. Equals in the order in
        which they came, those that have not come up yet first."""
        counters, numbers = self._counters, count()
        again: list[tuple[float, int, Line, Iterator[Request]]] = []
        fresh = sorted((line for line in lines if line), key=lambda line: counters.of(line.account))
        at = 0
        while at < len(fresh) or again:
            if at < len(fresh) and not (again and again[0][0] < counters.of(fresh[at].account)):
                line = fresh[at]
                at += 1
                if not line or leaves_out(line, None):
                    continue
                requests = line.order(_of_line(leaves_out, line))
            else:
                _, _, line, requests = heappop(again)
            before = counters.of(line.account)
            while line and not leaves_out(line, None) and (request := next(requests, None)) is not None:
                yield request
                if line and counters.of(line.account) > before:
                    heappush(again, (counters.of(line.account), next(numbers), line, requests))
                    break

    def lines(self) -> Iterator[Line]:
        """In the order of their first requests."""
        for lines in self.by_level():
            yield from sorted(lines, key=lambda line: self._counters.of(line.account))

    def priority(self, request: Request) -> int:
        """Its own, or beyond all others if it has waited for long."""
        return -self._places[request.id][0]

    def line(self, request: Request) -> Line:
        return self._places[request.id][1]

    def has_others(self, group: Group) -> bool:
        """Whether requests of another group wait."""
        return len(self._groups) > (group in self._groups)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[Request]:
        """In no order that matters."""
        return (request for lines in self._levels.values() for line in lines.values() for request in line)

    def __contains__(self, request: Request) -> bool:
        return request.id in self._places

    def _enter(self, request: Request, level: _Level) -> Line:
        """The line that it stands in from now on."""
        account, adapters = request.account, tuple(request.adapters)
        lines = self._levels.setdefault(level, {})
        line = lines.get((account, adapters))
        if line is None:
            if account not in self._lines_of:
                self._counters.come(account)
            line = lines[account, adapters] = Line(account, adapters)
            line.served_in = self.num_steps + 1
            if adapters:
                self._unserved[line] = None
            self._lines_of[account] += 1
        self._places[request.id] = level, line
        self._groups[request.group] += 1
        self._owns[-request.priority] += 1
        self.num_changes += 1
        return line

    def by_level(self) -> Iterator[list[Line]]:
        """Those of the highest priority first, and with them those that have aged, of whatever priority."""
        aged = list(self._levels.get(_AGED, {}).values())
        highest = min(self._owns, default=0)
        if aged and highest not in self._levels:
            yield aged
        for level in sorted(self._levels):
            if level != _AGED:
                yield [*(aged if level == highest else ()), *self._levels.get(level, {}).values()]

    def check(self) -> None:
        places: dict[int, tuple[_Level, Line]] = {}
        for level, lines in self._levels.items():
            assert lines
            for key, line in lines.items():
                assert line and key == (line.account, line.adapters)
                line.check()
                places |= {request.id: (level, line) for request in line}
                assert level == _AGED or all(request.priority == -level for request in line)
        assert places == self._places
        assert self._young.keys() == {number for number, (level, _) in places.items() if level != _AGED}
        assert self._groups == Counter(request.group for request in self)
        assert self._owns == Counter(-request.priority for request in self)
        assert set(self._unserved) == {line for _, line in places.values() if line.adapters}
        assert self._lines_of == Counter(line.account for lines in self._levels.values() for line in lines.values())


def _of_line(leaves_out: Callable[[Line, Group | None], bool], line: Line) -> Callable[[Group], bool]:
    return lambda group: leaves_out(line, group)
