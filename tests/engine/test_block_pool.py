"""Blocks: in whose hands each is, in which order they are handed out, and what they still remember."""

import random
from collections import Counter

import pytest

from server.engine.block_pool import BlockPool


def content(number: int) -> bytes:
    return number.to_bytes(4, "big")


def test_blocks_that_nobody_held_are_handed_out_in_order() -> None:
    pool = BlockPool(4)
    assert pool.num_free == 4
    assert pool.take(0) == [] and pool.take(3) == [0, 1, 2]
    assert pool.num_free == 1
    pool.check({0: 1, 1: 1, 2: 1})


def test_blocks_that_remember_nothing_are_handed_out_first_the_lowest_before_the_others() -> None:
    pool = BlockPool(6)
    pool.take(4)
    for block in (2, 0, 3):
        pool.release(block)
    assert pool.take(2) == [0, 2]
    assert pool.take(2) == [3, 4]  # and then one that nobody has held yet


def test_what_is_remembered_goes_last_and_what_was_released_longest_ago_before_the_rest() -> None:
    pool = BlockPool(5)
    pool.take(4)
    for block in (1, 2, 3):
        pool.remember(block, content(block))
    for block in (2, 0, 3, 1):
        pool.release(block)
    assert pool.take(2) == [0, 4] and pool.find(content(2)) == 2
    assert pool.take(2) == [2, 3] and pool.find(content(2)) is None and pool.find(content(1)) == 1
    pool.check({0: 1, 4: 1, 2: 1, 3: 1})


def test_a_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(1)
    (block,) = pool.take(1)
    pool.touch(block)
    pool.release(block)
    assert pool.num_free == 0
    pool.check({block: 1})
    pool.release(block)
    assert pool.num_free == 1
    pool.check({})


def test_content_is_found_in_a_held_block_and_in_a_free_one() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1)
    assert pool.find(content(7)) is None
    pool.remember(block, content(7))
    assert pool.find(content(7)) == block
    pool.release(block)
    assert pool.find(content(7)) == block and pool.num_free == 2
    pool.touch(block)  # a prefix hit takes it back out of the middle of the free ones
    assert pool.num_free == 1 and pool.take(1) == [1]
    pool.check({block: 1, 1: 1})


def test_content_is_forgotten_when_its_block_is_handed_out_again_and_not_before() -> None:
    pool = BlockPool(2)
    for block in pool.take(2):
        pool.remember(block, content(block))
        pool.release(block)
    assert pool.take(1) == [0]
    assert pool.find(content(0)) is None and pool.find(content(1)) == 1
    pool.remember(0, content(5))  # it may remember something else now
    assert pool.find(content(5)) == 0
    pool.check({0: 1})


def test_a_prefix_hit_makes_a_block_the_last_to_be_handed_out() -> None:
    pool = BlockPool(3)
    for block in pool.take(3):
        pool.remember(block, content(block))
        pool.release(block)
    pool.touch(0)
    pool.release(0)
    assert pool.take(3) == [1, 2, 0]


def test_of_two_blocks_with_one_content_the_first_is_found() -> None:
    pool = BlockPool(2)
    first, twin = pool.take(2)
    pool.remember(first, content(1))
    pool.remember(twin, content(1))
    assert pool.find(content(1)) == first
    pool.release(twin)
    assert pool.take(1) == [twin] and pool.find(content(1)) == first  # the twin had nothing to forget
    pool.check({first: 1, twin: 1})


def test_what_would_break_its_books_is_our_own_bug() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1)
    with pytest.raises(AssertionError):
        pool.take(2)
    with pytest.raises(AssertionError):
        pool.release(1)
    with pytest.raises(AssertionError):
        pool.remember(1, content(1))
    pool.remember(block, content(1))
    with pytest.raises(AssertionError):
        pool.remember(block, content(2))
    with pytest.raises(AssertionError):
        BlockPool(0)
    pool.check({block: 1})


@pytest.mark.parametrize("held", [{}, {0: 2}, {0: 1, 1: 1}, {1: 1}])
def test_its_check_finds_holders_that_it_was_not_told_of(held: dict[int, int]) -> None:
    pool = BlockPool(2)
    pool.take(1)
    pool.check({0: 1})
    with pytest.raises(AssertionError):
        pool.check(held)


@pytest.mark.parametrize("seed", range(3))
def test_under_random_use_it_agrees_with_a_pool_that_keeps_nothing_incrementally(seed: int) -> None:
    """The model: free blocks, those that nobody held, and what each is filled with."""
    rng, pool, size = random.Random(seed), BlockPool(6), 6
    held: Counter[int] = Counter()
    free, never_held, filled = list[int](), list(range(size)), dict[int, bytes]()
    seen: Counter[str] = Counter()
    for _ in range(3000):
        match rng.choice(("take", "release", "release", "find", "remember")):
            case "take" if free or never_held:
                blank = sorted(block for block in free if block not in filled)
                in_order = [*blank, *never_held, *(block for block in free if block in filled)]
                taken = in_order[: rng.randrange(1, len(in_order) + 1)]
                assert pool.take(len(taken)) == taken
                for block in taken:
                    (never_held if block in never_held else free).remove(block)
                    filled.pop(block, None)
                    held[block] += 1
                seen["take"] += len(taken)
            case "release" if held:
                block = rng.choice(sorted(held))
                pool.release(block)
                held[block] -= 1
                if not held[block]:
                    del held[block]
                    free.append(block)
            case "find":
                wanted = content(rng.randrange(8))
                block = next((it for it, what in filled.items() if what == wanted), None)
                assert pool.find(wanted) == block
                if block is not None:
                    seen["hit a free one" if block in free else "hit a held one"] += 1
                    pool.touch(block)
                    held[block] += 1
                    free = [it for it in free if it != block]
            case "remember" if empty := [block for block in sorted(held) if block not in filled]:
                block, what = rng.choice(empty), content(rng.randrange(8))
                pool.remember(block, what)
                if what not in filled.values():
                    filled[block] = what
                else:
                    seen["twin"] += 1
        assert pool.num_free == len(free) + len(never_held)
        pool.check(dict(held))
    assert min(seen[what] for what in ("take", "hit a free one", "hit a held one", "twin")) > 50, seen


def hold_and_release(pool: BlockPool, contents: list[int]) -> int:
    """As a request with a prompt of these does; returns how many were found."""
    wanted = [content(number) for number in contents]
    found = [block for it in wanted if (block := pool.find(it)) is not None]
    for block in found:
        pool.touch(block)
    missing = [it for it in wanted if pool.find(it) is None]
    pool.missed(missing)
    taken = pool.take(len(missing))
    for block, it in zip(taken, missing, strict=True):
        pool.remember(block, it)
    pool.check(Counter([*found, *taken]))
    for block in [*found, *taken]:
        pool.release(block)
    pool.check({})
    return len(found)


def test_prompts_that_nobody_sends_again_take_no_more_memory() -> None:
    pool = BlockPool(1000)
    held = []
    for number in range(0, 4000, 10):
        assert hold_and_release(pool, list(range(number, number + 10))) == 0
        held.append(len(pool._held_in))
    assert held[-1] == held[len(held) // 2] == 64


def test_memory_grows_for_prompts_that_come_again() -> None:
    """40 prompts of 10 blocks in turn: the first round finds nothing, the second takes memory, a later finds all."""
    pool = BlockPool(1000)
    prompts = [list(range(number * 10, number * 10 + 10)) for number in range(40)]
    found = [sum(hold_and_release(pool, prompt) for prompt in prompts) for _ in range(4)]
    assert found[0] == 0 and found[-1] == 400 and len(pool._held_in) <= 525


def test_a_small_pool_is_taken_into_use_before_anything_is_forgotten() -> None:
    pool = BlockPool(60)
    for number in range(6):
        hold_and_release(pool, list(range(number * 10, number * 10 + 10)))
    assert all(pool.find(content(number)) is not None for number in range(60))
