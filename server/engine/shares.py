"""What adapters and groups may keep of the places and KV blocks while others want them.

Among several adapters at work each may keep its part of them by weight; a group (the requests of one HTTP request) may
keep an equal part of what its adapter may. What somebody holds beyond that it may use as long as nobody else asks for
it: it is given back by preemption, newest first.

An adapter that is within its share may have what others hold beyond theirs: first what a group of theirs holds beyond
its own, then their newest, but never an adapter's oldest. A group that is within its share may have what groups of the
same adapter hold beyond theirs, but never a group's oldest. Nothing is taken from a request of a higher priority.
Nobody goes beyond its own share by what it takes, nor is an adapter left with less than its share, nor a group for the
sake of another of its adapter. So nobody takes back what was taken from it, and no requests go back and forth.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

from server.engine.at_work import AtWork
from server.engine.kv_cache import KVCache
from server.engine.request import Group, Request

_ROUNDING = 1e-9  # of a part: three times a third is one
_Owner = str | tuple[str, Group]  # an adapter by its name, or a group of it


class Shares:
    """As of one moment of one step; `running` is in order of admission.

    A place is one lane's. A request counts with the blocks that it needs for all its tokens, those that are still to be
    computed included.
    """

    def __init__(self, running: Sequence[Request], at_work: AtWork, max_running: int, kv_cache: KVCache) -> None:
        self._running, self._at_work, self._kv_cache = running, at_work, kv_cache
        self._max_running, self._num_blocks = max_running, kv_cache.pool.num_within_reach
        self._sum = sum(at_work.weights.values())
        self._are_adapters = len(at_work.weights) > 1
        self._kept: dict[_Owner, tuple[int, int] | None] = {}
        self._held_places: Counter[_Owner] = Counter()
        self._held_blocks: Counter[_Owner] = Counter()
        self._missing_blocks = 0
        self._victims: tuple[list[Request], dict[str, list[Request]]] | None = None  # until something is counted
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

    def is_used_up(self, owner: _Owner) -> bool:
        """Whether one more request would take the adapter, or the group, beyond its share. One that is alone may have
        everything."""
        share = self._share(owner)
        return share is not None and (self._held_places[owner] >= share[0] or self._held_blocks[owner] >= share[1])

    def lets_pass(self, request: Request) -> bool:
        """Whether a request may start before one that waits for blocks: there is room for it to its very end."""
        return self._kv_cache.max_blocks(request) <= self.num_free_blocks

    # -- what may be taken -----------------------------------------------------------

    @property
    def has_victims(self) -> bool:
        """Whether somebody holds more than its share."""
        of_adapters, of_groups = self._beyond()
        return bool(of_adapters or of_groups)

    def victims(self, request: Request, num_blocks: int, priority: int) -> Iterator[Request]:
        """What a request that is to start with so many blocks may take, in the order in which it is taken. priority:
        its own, or more."""
        of_adapters, of_groups = self._beyond()
        account = request.account
        others = of_adapters if self._has_room(account, request, num_blocks) else ()
        own = of_groups.get(account, ()) if self._has_room((account, request.group), request, num_blocks) else ()
        return (victim for victim in chain(others, own) if victim.priority <= priority)

    def may_take(self, account: str, priority: int) -> bool:
        """Whether anything may be taken for some request of the adapter and this priority."""
        of_adapters, of_groups = self._beyond()
        others = () if self.is_used_up(account) else of_adapters
        return any(victim.priority <= priority for victim in chain(others, of_groups.get(account, ())))

    def beyond(self, account: str) -> Iterator[Request]:
        """What makes room for one of this adapter that runs and grows: what is beyond anybody's share, but of no other
        adapter that is within its own."""
        of_adapters, of_groups = self._beyond()
        return chain(of_adapters, of_groups.get(account, ()))

    def num_blocks_of(self, request: Request) -> int:
        return self._kv_cache.num_held_blocks(request) + self._kv_cache.num_missing_blocks(request)

    def _has_room(self, owner: _Owner, request: Request, num_blocks: int) -> bool:
        """Whether the owner stays within its share with this request and so many blocks. An owner's first may always
        have them: it may be larger than a share, and has to run some day."""
        share = self._share(owner)
        if share is None or not self._held_places[owner]:
            return True
        has_places = self._held_places[owner] + len(request.lanes) <= share[0]
        return has_places and self._held_blocks[owner] + num_blocks <= share[1]

    def _beyond(self) -> tuple[list[Request], dict[str, list[Request]]]:
        """Of adapters that hold more than their share, and of groups that do, by adapter."""
        if self._victims is None:
            newest = self._running[::-1]
            of_groups = self._taken([((it.account, it.group), it) for it in newest])
            of_adapters: list[Request] = []
            if self._are_adapters:
                there = {request.id for request in of_groups}
                candidates = [*of_groups, *(request for request in newest if request.id not in there)]
                of_adapters = self._taken([(request.account, request) for request in candidates])
            by_adapter: dict[str, list[Request]] = {}
            for request in of_groups:
                by_adapter.setdefault(request.account, []).append(request)
            self._victims = of_adapters, by_adapter
        return self._victims

    def _taken(self, candidates: Sequence[tuple[_Owner, Request]]) -> list[Request]:
        """Those without which their owners still have their whole shares, as they are taken one after another.

        The last one of an owner, which is its oldest, never is: else one that is larger than a share would be preempted
        by every small one.
        """
        places, blocks, last = self._held_places.copy(), self._held_blocks.copy(), dict(candidates)
        taken: list[Request] = []
        within: set[_Owner] = set()
        for owner, request in candidates:
            if owner in within:
                continue
            share, needed = self._share(owner), self.num_blocks_of(request)
            if share is not None and request is not last[owner]:
                keeps_places = places[owner] - len(request.lanes) >= share[0]
                keeps_blocks = blocks[owner] - needed >= share[1]
                if keeps_places or keeps_blocks:
                    places[owner] -= len(request.lanes)
                    blocks[owner] -= needed
                    taken.append(request)
                    continue
            within.add(owner)
        return taken

    def _share(self, owner: _Owner) -> tuple[int, int] | None:
        """Places and blocks that the owner may keep. None: everything, since there is no other."""
        if owner not in self._kept:
            self._kept[owner] = (
                self._share_of_adapter(owner) if isinstance(owner, str) else self._share_of_group(*owner)
            )
        return self._kept[owner]

    def _share_of_adapter(self, account: str) -> tuple[int, int] | None:
        if not self._are_adapters:
            return None
        part = self._at_work.weights[account] / self._sum + _ROUNDING
        return max(1, int(self._max_running * part)), max(1, int(self._num_blocks * part))

    def _share_of_group(self, account: str, group: Group) -> tuple[int, int] | None:
        share, num_groups = self._share(account), self._at_work.num_groups(account)
        if num_groups < 2:
            return share
        places, blocks = share or (self._max_running, self._num_blocks)
        return max(1, places // num_groups), max(1, blocks // num_groups)

    def _count(self, request: Request, sign: int) -> None:
        missing, held = self._kv_cache.num_missing_blocks(request), self._kv_cache.num_held_blocks(request)
        self._missing_blocks += sign * missing
        self._victims = None
        for owner in (request.account, (request.account, request.group)):
            self._held_places[owner] += sign * len(request.lanes)
            self._held_blocks[owner] += sign * (held + missing)
