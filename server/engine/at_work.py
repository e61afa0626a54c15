"""Who has requests that have not ended: adapters by name ("": the base), and their groups."""

from collections import Counter
from collections.abc import Iterable, Mapping

from server.engine.request import Group, Request


class AtWork:
    """The weight of an adapter is that of its latest request: its manifest may have changed meanwhile."""

    def __init__(self) -> None:
        self._groups: dict[str, Counter[Group]] = {}
        self._weights: dict[str, float] = {}

    def add(self, request: Request) -> None:
        self._groups.setdefault(request.account, Counter())[request.group] += 1
        self._weights[request.account] = request.weight

    def remove(self, request: Request) -> bool:
        """Whether it was the last of its adapter."""
        groups = self._groups[request.account]
        groups[request.group] -= 1
        if not groups[request.group]:
            del groups[request.group]
        if not groups:
            del self._groups[request.account], self._weights[request.account]
        return not groups

    @property
    def weights(self) -> Mapping[str, float]:
        return self._weights

    def num_groups(self, account: str) -> int:
        return len(self._groups.get(account, ()))

    def check(self, requests: Iterable[Request]) -> None:
        groups: dict[str, Counter[Group]] = {}
        for request in requests:
            groups.setdefault(request.account, Counter())[request.group] += 1
        assert groups == self._groups
        assert self._weights.keys() == groups.keys()
