"""One budget of bytes for all who keep something on the device: KV blocks and adapters."""

from typing import Protocol


class Idle(Protocol):
    """What of a share's memory is there and not in use."""

    def num_bytes(self) -> int:
        """That would come free if all of it was given up, at least."""

    def unused_since(self) -> float | None:
        """Since when what would go first has not been used (seconds of the clock that steps are told of); None: there
        is nothing."""

    def give_up(self) -> None:
        """What has not been used for longest, or is worth least."""


class Share:
    """What one of them holds. It may always have `floor` bytes, never more than `cap`, and between the two what the
    others leave."""

    def __init__(self, name: str, floor: int, cap: int, budget: "MemoryBudget") -> None:
        self.name, self.floor, self.cap = name, floor, cap
        self.used = 0
        self.claimed = 0  # bytes more that nobody else may take, since somebody has waited for them for too long
        self.idle: Idle | None = None  # None: all of it is in use
        self.budget = budget

    @property
    def free(self) -> int:
        """Bytes that it may take as things are."""
        return min(self.cap - self.used, self.budget.free_beside(self))

    @property
    def within_reach(self) -> int:
        """Bytes that it may take if the others give up what they do not use."""
        if self.are_claimed:
            return max(0, self.free)  # what others give up is claimed
        return min(self.cap - self.used, self.budget.free_beside(self) + self.budget.idle_beside(self))

    @property
    def are_claimed(self) -> bool:
        """Whether another one claims memory."""
        return any(it.claimed for it in self.budget.shares if it is not self)

    @property
    def left(self) -> int:
        """Bytes that it may hold, in all; where others claim some, fewer than it holds, perhaps."""
        return min(self.cap, self.used + self.budget.free_beside(self))

    def take(self, num_bytes: int) -> None:
        """The caller has seen that they are free."""
        assert 0 <= num_bytes <= self.free, f"{self.name}: {num_bytes:,} bytes of {self.free:,}"
        self.used += num_bytes

    def give_back(self, num_bytes: int) -> None:
        assert 0 <= num_bytes <= self.used
        self.used -= num_bytes

    def make_room(self, num_bytes: int, unused_since: float) -> bool:
        """Have others give up what nobody has used since then, until so many bytes are free. Nothing is given up in
        vain where even all of that would be too little."""
        if num_bytes > self.within_reach:
            return False
        while self.free < num_bytes:
            if not self.ask_others(unused_since):
                return False
        return True

    def others_unused_since(self) -> float | None:
        """Since when what the others would give up next for this one has not been used; None: there is nothing."""
        return self.budget.unused_beside(self)

    def ask_others(self, unused_since: float) -> bool:
        """Have them give up the next piece. Whether they had any that nobody has used since then."""
        return self.budget.give_up_beside(self, unused_since)

    @property
    def idle_bytes(self) -> int:
        """That it would give up for others, who never bring it below its floor."""
        return max(0, min(self.idle.num_bytes() if self.idle else 0, self.used - self.floor))


class MemoryBudget:
    """`total` bytes, all of them once within somebody's floor or free for all. Torch-free, and unaware of pages."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.shares: list[Share] = []

    def open(self, name: str, floor: int, cap: int) -> Share:
        """A share of it. Floors of all must fit in the total."""
        assert 0 <= floor <= cap <= self.total
        share = Share(name, floor, cap, self)
        self.shares.append(share)
        assert sum(it.floor for it in self.shares) <= self.total
        return share

    @property
    def used(self) -> int:
        return sum(it.used for it in self.shares)

    def free_beside(self, share: Share) -> int:
        """What the others hold, or may always have, is not free for it."""
        others = sum(max(it.used + it.claimed, it.floor) for it in self.shares if it is not share)
        return self.total - others - share.used

    def idle_beside(self, share: Share) -> int:
        return sum(it.idle_bytes for it in self.shares if it is not share)

    def unused_beside(self, share: Share) -> float | None:
        candidates = [it.idle.unused_since() for it in self.shares if it is not share and it.idle and it.idle_bytes]
        return min((since for since in candidates if since is not None), default=None)

    def give_up_beside(self, share: Share, unused_since: float) -> bool:
        """Whether anything was."""
        for other in self.shares:
            if other is share or other.idle is None or not other.idle_bytes:
                continue
            since = other.idle.unused_since()
            if since is not None and since <= unused_since:
                other.idle.give_up()
                return True
        return False

    def check(self) -> None:
        assert all(0 <= it.used <= it.cap for it in self.shares)
        assert sum(max(it.used, it.floor) for it in self.shares) <= self.total
        assert sum(it.used for it in self.shares) <= self.total
