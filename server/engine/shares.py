"""What one group may keep of the places and KV blocks while others want them.

With n groups at work each may keep an n-th, and never more than half. What a group holds beyond that it may use as long
as nobody else asks for it: it is given back by preemption, newest first.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

from server.engine.kv_cache import KVCache
from server.engine.request import Group, Request


class Shares:
    """As of one moment of one step; `running` is in order of admission.

    A place is one lane's. A request counts with the blocks that it needs for all its tokens, those that are still to be
    computed included.
    """

    def __init__(self, running: Sequence[Request], num_groups: int, max_running: int, kv_cache: KVCache) -> None:
        self._running, self._kv_cache = running, kv_cache
        self._is_alone = num_groups < 2
        self._places = max(1, max_running // max(2, num_groups))
        self._blocks = max(1, kv_cache.pool.num_blocks // max(2, num_groups))  # of none, a group has used up all
        self._held_places: Counter[Group] = Counter()
        self._held_blocks: Counter[Group] = Counter()
        self._missing_blocks = 0
        for request in running:
            self.take(request)

    def take(self, request: Request) -> None:
        """The request runs now."""
        self._count(request, 1)

    def give_back(self, request: Request) -> None:
        """The request is about to stop running, and still has its blocks."""
        self._count(request, -1)

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody who runs needs for the tokens that it has."""
        return self._kv_cache.pool.num_free - self._missing_blocks

    def is_used_up(self, group: Group) -> bool:
        """Whether one more request would take the group beyond its share."""
        if self._is_alone:
            return False
        return self._held_places[group] >= self._places or self._held_blocks[group] >= self._blocks

    def has_room_for(self, request: Request, num_blocks: int) -> bool:
        """Whether this one with so many blocks stays within its group's share. A group's first may always have them: it
        may be larger than a share, and has to run some day."""
        group = request.group
        has_places = self._held_places[group] + len(request.lanes) <= self._places
        has_blocks = self._held_blocks[group] + num_blocks <= self._blocks
        return (has_places and has_blocks) or not self._held_places[group]

    def lets_pass(self, request: Request) -> bool:
        """Whether a request may start before one that waits for blocks: there is room for it to its very end."""
        return self._kv_cache.max_blocks(request) <= self.num_free_blocks

    def beyond(self) -> Iterator[Request]:
        """What may be taken back, newest first: requests without which their group still has its whole share.

        So what is taken from a group never brings it below what it may keep, which it would then take back; and its
        oldest is never taken, else one that is larger than a share would be preempted by every small one.
        """
        if self._is_alone:
            return
        places, blocks = self._held_places.copy(), self._held_blocks.copy()
        oldest = {request.group: request for request in reversed(self._running)}
        within: set[Group] = set()
        for request in reversed(self._running):
            group, needed = request.group, self.num_blocks_of(request)
            if group in within:
                continue
            keeps_places = places[group] - len(request.lanes) >= self._places
            keeps_blocks = blocks[group] - needed >= self._blocks
            if (keeps_places or keeps_blocks) and request is not oldest[group]:
                places[group] -= len(request.lanes)
                blocks[group] -= needed
                yield request
            else:
                within.add(group)

    def num_blocks_of(self, request: Request) -> int:
        return self._kv_cache.num_held_blocks(request) + self._kv_cache.num_missing_blocks(request)

    def _count(self, request: Request, sign: int) -> None:
        missing = self._kv_cache.num_missing_blocks(request)
        self._held_places[request.group] += sign * len(request.lanes)
        self._held_blocks[request.group] += sign * (self._kv_cache.num_held_blocks(request) + missing)
        self._missing_blocks += sign * missing
