"""One budget: floors that nobody else touches, caps, and what is given up by whom."""

import random

import pytest

from server.weights.budget import MemoryBudget, Share


class Pieces:
    """What a share keeps and does not use: pieces, each unused since some time."""

    def __init__(self, share: Share, sizes: list[tuple[int, float]]) -> None:
        self.share, self.pieces = share, sorted(sizes, key=lambda it: it[1])
        share.take(self.num_bytes())
        share.idle = self

    def num_bytes(self) -> int:
        return sum(size for size, _ in self.pieces)

    def unused_since(self) -> float | None:
        return self.pieces[0][1] if self.pieces else None

    def give_up(self) -> None:
        self.share.give_back(self.pieces.pop(0)[0])


def test_what_is_between_the_floors_belongs_to_who_takes_it_first() -> None:
    budget = MemoryBudget(100)
    kv, adapters = budget.open("kv", 20, 90), budget.open("adapters", 10, 80)
    assert (kv.free, adapters.free) == (90, 80)
    kv.take(50)
    assert (kv.free, adapters.free) == (40, 50)
    adapters.take(50)
    assert (kv.free, adapters.free) == (0, 0)
    kv.give_back(45)  # what is left of its floor stays its own
    assert (kv.free, adapters.free) == (45, 30)
    budget.check()


def test_nobody_takes_what_is_not_free() -> None:
    budget = MemoryBudget(100)
    kv, adapters = budget.open("kv", 20, 90), budget.open("adapters", 10, 80)
    with pytest.raises(AssertionError, match="kv: 91 bytes of 90"):
        kv.take(91)
    adapters.take(80)
    with pytest.raises(AssertionError):
        adapters.take(1)
    with pytest.raises(AssertionError):
        budget.open("more", 71, 80)


def test_what_was_unused_longest_is_given_up_and_no_more_than_is_needed() -> None:
    budget = MemoryBudget(100)
    kv, adapters = budget.open("kv", 20, 90), budget.open("adapters", 10, 80)
    idle = Pieces(adapters, [(20, 5.0), (20, 3.0), (20, 4.0)])
    kv.take(30)
    assert kv.free == 10 and kv.within_reach == 10 + 50  # never below their floor
    assert kv.make_room(25, unused_since=10.0) and idle.pieces == [(20, 4.0), (20, 5.0)]
    assert not kv.make_room(40, unused_since=3.5), "what is left was used since"
    assert idle.pieces == [(20, 4.0), (20, 5.0)]
    assert not kv.make_room(61, unused_since=10.0), "all of it would not do"
    assert idle.pieces == [(20, 4.0), (20, 5.0)]
    budget.check()


def test_nobody_is_asked_for_what_would_bring_it_below_its_floor() -> None:
    budget = MemoryBudget(100)
    kv, adapters = budget.open("kv", 0, 100), budget.open("adapters", 30, 100)
    idle = Pieces(adapters, [(15, 1.0), (15, 2.0)])
    kv.take(70)
    assert kv.within_reach == 0 and not kv.make_room(1, unused_since=10.0) and len(idle.pieces) == 2


def test_random_takes_stay_within_the_budget() -> None:
    rng = random.Random(3)
    for _ in range(200):
        total = rng.randrange(10, 1000)
        floors = sorted(rng.randrange(total) for _ in range(2))
        budget = MemoryBudget(total)
        shares = [
            budget.open("a", floors[0], rng.randint(floors[0], total)),
            budget.open("b", total - floors[1], rng.randint(total - floors[1], total)),
        ]
        for _ in range(30):
            share = rng.choice(shares)
            if rng.random() < 0.6:
                share.take(rng.randint(0, share.free))
            else:
                share.give_back(rng.randint(0, share.used))
            budget.check()
            for it in shares:  # whatever the other holds, there is room up to the floor
                assert it.free >= it.floor - it.used
