"""A request and its lanes: how tokens are divided among them, and when it has had enough."""

import pytest

from adapters_store.ref import AdapterRef
from server.engine.request import BASE_SLOT, FinishReason, LaneSpec, Request, Sampling, Status

REF = AdapterRef("name", "revision", "lora")


def request(*lengths: int, max_tokens: int = 4, stop_token_ids: frozenset[int] = frozenset()) -> Request:
    return Request(7, [LaneSpec([1] * length) for length in lengths], max_tokens, Sampling(), stop_token_ids)


def test_it_begins_with_nothing_computed_held_or_said() -> None:
    prompt = [1, 2, 3]
    it = Request(7, [LaneSpec(prompt, REF), LaneSpec([4])], 5, Sampling(seed=9))
    assert it.status is Status.WAITING and not it.was_admitted
    assert (it.id, it.group, it.max_tokens, it.sampling, it.stop_token_ids) == (7, 7, 5, Sampling(seed=9), frozenset())
    assert it.num_cached_tokens == it.num_passes == it.num_generated == 0
    assert it.first is it.lanes[0] and it.adapters == [REF]
    assert it.num_uncomputed_tokens == 4
    for lane in it.lanes:
        assert lane.request is it and lane.slot == BASE_SLOT == 0
        assert lane.num_computed_tokens == lane.num_committed_blocks == 0
        assert lane.block_table == [] and lane.block_hashes == []
    it.append(8)
    assert prompt == [1, 2, 3]  # it belongs to whoever asked


def test_what_is_sampled_becomes_the_next_token_of_every_lane() -> None:
    it = request(3, 1)
    assert it.append(5) is None and it.append(6) is None
    assert [lane.tokens for lane in it.lanes] == [[1, 1, 1, 5, 6], [1, 5, 6]]
    assert [lane.num_uncomputed_tokens for lane in it.lanes] == [5, 3]
    assert it.num_generated == 2 and it.num_uncomputed_tokens == 8


def test_it_ends_with_a_stop_token_or_with_the_last_that_it_wants() -> None:
    it = request(2, max_tokens=3, stop_token_ids=frozenset([9]))
    assert [it.append(token) for token in (1, 2, 3)] == [None, None, FinishReason.LENGTH]
    it = request(2, max_tokens=3, stop_token_ids=frozenset([9]))
    assert [it.append(token) for token in (1, 9)] == [None, FinishReason.STOP]
    it = request(2, max_tokens=1, stop_token_ids=frozenset([9]))
    assert it.append(9) is FinishReason.STOP  # both: it said what it had to say


def test_kv_cache_is_wanted_for_all_but_the_last_token() -> None:
    assert [request(5, max_tokens=count).first.max_len for count in (0, 1, 2, 9)] == [5, 5, 6, 13]


def test_enough_tokens_for_all_lanes_bring_each_to_its_end() -> None:
    it = request(5, 1, 3)
    for count in (9, 10, 100):
        assert it.divide(count) == list(zip(it.lanes, (5, 1, 3), strict=True))
    it.first.num_computed_tokens = 4
    assert it.divide(5) == list(zip(it.lanes, (1, 1, 3), strict=True))


@pytest.mark.parametrize(
    ("count", "shares"),
    [(8, [(0, 4), (2, 2)]), (6, [(0, 4), (2, 2)]), (5, [(0, 4), (2, 1)]), (4, [(0, 4)]), (3, [(0, 3)]), (1, [(0, 1)]),
     (0, [])],
)  # fmt: skip
def test_where_tokens_do_not_reach_to_all_ends_each_lane_keeps_its_last_one(
    count: int, shares: list[tuple[int, int]]
) -> None:
    it = request(5, 1, 3)
    assert it.divide(count) == [(it.lanes[index], own) for index, own in shares]


def test_a_lane_that_waits_for_the_others_gets_nothing_meanwhile() -> None:
    it = request(5, 6)
    it.first.num_computed_tokens = 4
    assert it.divide(3) == [(it.lanes[1], 3)]


def test_a_request_without_lanes_or_a_lane_without_a_prompt_is_our_own_bug() -> None:
    with pytest.raises(AssertionError):
        request()
    with pytest.raises(AssertionError):
        request(0)
    with pytest.raises(AssertionError):
        request(1, max_tokens=-1)
