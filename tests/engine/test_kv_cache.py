"""Block tables and prefixes, without a scheduler."""

import pytest

from adapters_store.ref import AdapterRef
from server.engine.kv_cache import KVCache, chain_root
from server.engine.request import LaneSpec, Request, Sampling

BLOCK = 4
ADAPTER = AdapterRef("name", "revision", "lora")


def request(prompt: list[int], adapter: AdapterRef | None = None, *beside: LaneSpec, max_tokens: int = 1) -> Request:
    return Request(0, [LaneSpec(prompt, adapter), *beside], max_tokens, Sampling())


def compute(cache: KVCache, it: Request) -> None:
    """All that it has, as a step would."""
    assert cache.grow(it.divide(it.num_uncomputed_tokens))
    for lane in it.lanes:
        lane.num_computed_tokens = len(lane.tokens)
        cache.commit(lane, len(lane.tokens))


def test_blocks_are_held_for_tokens_that_begin_them_and_for_no_others() -> None:
    cache = KVCache(5, BLOCK)
    it = request(list(range(9)))
    assert cache.num_missing_blocks(it) == 3
    assert cache.grow([(it.first, 4)]) and len(it.first.block_table) == 1
    it.first.num_computed_tokens = 4
    assert cache.grow([(it.first, 1)]) and len(it.first.block_table) == 2
    assert cache.grow([(it.first, 4)]) and len(it.first.block_table) == 2  # they are there
    assert cache.num_missing_blocks(it) == 1 and cache.num_held_blocks(it) == 2
    cache.check([it])
    cache.release(it)
    assert cache.pool.num_free == 5 and it.first.num_computed_tokens == 0
    cache.check([])


def test_where_blocks_do_not_suffice_for_all_lanes_none_gets_any() -> None:
    cache = KVCache(3, BLOCK)
    it = request([1] * 8, None, LaneSpec([2] * 5))
    assert cache.max_blocks(it) == cache.num_missing_blocks(it) == 4
    assert not cache.grow(it.divide(13))
    assert cache.pool.num_free == 3 and not it.lanes[0].block_table
    cache.check([it])


def test_lanes_that_have_room_in_their_last_block_take_no_other() -> None:
    cache = KVCache(3, BLOCK)
    it = request([1] * 3, None, LaneSpec([2] * 4))
    compute(cache, it)
    it.append(9)
    assert cache.num_held_blocks(it) == 2 and cache.num_missing_blocks(it) == 1
    assert cache.grow(it.divide(2)) and [len(lane.block_table) for lane in it.lanes] == [1, 2]
    assert cache.pool.num_free == cache.num_missing_blocks(it) == 0 and cache.num_held_blocks(it) == 3
    for lane in it.lanes:
        lane.num_computed_tokens = len(lane.tokens)
    assert cache.grow([(it.lanes[1], 3)])  # none is free, and none is needed
    cache.check([it])


def test_a_block_becomes_known_by_its_tokens_when_it_is_full_however_they_came() -> None:
    cache = KVCache(20, BLOCK)
    first = request([1] * 6)
    compute(cache, first)
    for _ in range(3):
        first.append(2)
    compute(cache, first)
    assert len(first.first.block_hashes) == first.first.num_committed_blocks == 2
    for prompt, found in (([1] * 6 + [2] * 3, 8), ([1] * 6 + [3] * 3, 4), ([1] * 9, 4)):
        other = request(prompt)
        cache.attach_prefix(other)
        assert other.first.num_computed_tokens == found
        cache.check([first, other])
        cache.release(other)


def test_a_prefix_is_given_to_those_that_hold_nothing_only() -> None:
    cache = KVCache(20, BLOCK)
    it = request([1] * 6)
    compute(cache, it)
    with pytest.raises(AssertionError):
        cache.attach_prefix(it)
    it.first.num_computed_tokens = 0
    with pytest.raises(AssertionError):
        cache.attach_prefix(it)


def test_the_last_token_that_is_sampled_needs_no_room() -> None:
    cache = KVCache(10, BLOCK)
    assert cache.max_blocks(request([1] * 4, max_tokens=1)) == 1
    assert cache.max_blocks(request([1] * 4, max_tokens=2)) == 2
    assert cache.max_blocks(request([1] * 4, max_tokens=0)) == 1
    assert cache.capacity == 40 and [cache.num_blocks(count) for count in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_a_prefix_is_found_by_whole_blocks_and_leaves_a_token_to_compute() -> None:
    cache = KVCache(20, BLOCK)
    first = request(list(range(10)))
    compute(cache, first)
    for prompt, found in ((list(range(10)), 8), (list(range(8)), 4), (list(range(7)) + [99], 4), ([99, *range(9)], 0)):
        second = request(prompt)
        cache.attach_prefix(second)
        assert second.first.num_computed_tokens == found
        assert second.first.block_table == first.first.block_table[: found // BLOCK]
        cache.check([first, second])
        cache.release(second)


def test_a_prefix_outlives_its_request_until_its_blocks_are_needed() -> None:
    cache = KVCache(4, BLOCK)
    first = request(list(range(12)))
    compute(cache, first)
    cache.release(first)
    again = request(list(range(12)))
    cache.attach_prefix(again)
    assert again.first.num_computed_tokens == 8
    cache.release(again)
    other = request([50] * 8)
    compute(cache, other)  # takes the free block, and then the one that was freed first: the last of the prefix
    cache.release(other)
    cache.attach_prefix(again)
    assert again.first.num_computed_tokens == 8
    cache.release(again)
    compute(cache, request([60] * 16))
    cache.attach_prefix(again)
    assert again.first.num_computed_tokens == 0


def test_the_same_tokens_through_another_adapter_are_another_prefix() -> None:
    """By revision: a name can come to mean other weights, and a salt or a name must not read as a revision."""
    cache = KVCache(20, BLOCK)
    compute(cache, request([7] * 8, ADAPTER))
    for adapter, found in (
        (None, 0),
        (AdapterRef("name", "other", "lora"), 0),
        (AdapterRef("new", "revision", "lora"), 4),
    ):
        it = request([7] * 8, adapter)
        cache.attach_prefix(it)
        assert it.first.num_computed_tokens == found
    assert len({chain_root(it) for it in (None, ADAPTER, AdapterRef("name", "base", "lora"))}) == 3
    assert len(chain_root(None)) == 16  # bytes: every block of every request keeps one


def test_the_same_tokens_under_another_salt_are_another_prefix() -> None:
    cache = KVCache(20, BLOCK)
    other_name = AdapterRef("other name", ADAPTER.revision, "lora")
    compute(cache, Request(0, [LaneSpec([7] * 8, ADAPTER, "salt")], 1, Sampling()))
    for adapter, salt, found in ((ADAPTER, "", 0), (ADAPTER, "other", 0), (None, "salt", 0), (other_name, "salt", 4)):
        it = Request(0, [LaneSpec([7] * 8, adapter, salt)], 1, Sampling())
        cache.attach_prefix(it)
        assert it.first.num_computed_tokens == found
    refs = (None, ADAPTER, AdapterRef("name", "salt", "lora"))
    assert len({chain_root(ref, salt) for ref in refs for salt in ("", "salt", "revision", "adapter")}) == 12
    assert chain_root(ADAPTER, "") == chain_root(ADAPTER)


def test_first_admissions_are_counted() -> None:
    cache = KVCache(20, BLOCK)
    compute(cache, request(list(range(9))))
    it = request(list(range(9)))
    cache.attach_prefix(it)
    cache.count_prefix(it)
    assert (cache.num_prefix_queries, cache.num_prefix_hits, it.num_cached_tokens) == (9, 8, 8)
    other = request([99] * 5, None, LaneSpec(list(range(7))))
    cache.attach_prefix(other)
    cache.count_prefix(other)
    assert (cache.num_prefix_queries, cache.num_prefix_hits, other.num_cached_tokens) == (21, 12, 0)
