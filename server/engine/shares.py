"""What one group may keep of the places and KV blocks while others want them.

With n groups at work each may keep an n-th, and never more than half. What a group holds beyond that it may use as long
as nobody else asks for it: it is given back by preemption, newest first.
"""

from collections import Counter
from collections.abc import Sequence

from server.engine.request import Group, Request


class Shares:
    """As of one moment of one step; `running` is in order of admission."""

    def __init__(self, running: Sequence[Request], num_groups: int, max_running: int, num_blocks: int) -> None:
        self._running = running
        self._is_alone = num_groups < 2
        self._places = max(1, max_running // max(2, num_groups))
        self._blocks = num_blocks // max(2, num_groups)
        self._held_places: Counter[Group] = Counter()
        self._held_blocks: Counter[Group] = Counter()
        for request in running:
            self.take(request)

    def take(self, request: Request) -> None:
        """The request runs now."""
        self._held_places[request.group] += 1
        self._held_blocks[request.group] += len(request.block_table)

    def give_back(self, request: Request) -> None:
        """The request is about to stop running, and still has its blocks."""
        self._held_places[request.group] -= 1
        self._held_blocks[request.group] -= len(request.block_table)

    def is_used_up(self, group: Group) -> bool:
        """Whether one more request would take the group beyond its share."""
        if self._is_alone:
            return False
        return self._held_places[group] >= self._places or self._held_blocks[group] > self._blocks

    def newest_beyond(self) -> Request | None:
        """The newest request without which its group is still at its share or above. Never a group's only one: a
        single request that is larger than a share would else be preempted by every small one, and never end."""
        if self._is_alone:
            return None
        return next((request for request in reversed(self._running) if self._is_beyond(request.group)), None)

    def _is_beyond(self, group: Group) -> bool:
        places, blocks = self._held_places[group], self._held_blocks[group]
        return places > 1 and (places > self._places or blocks > self._blocks)
