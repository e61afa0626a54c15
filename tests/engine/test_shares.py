"""What a group may keep while others want it, and what is taken back from one that holds more."""

import pytest

from server.engine.kv_cache import KVCache
from server.engine.request import LaneSpec, Request, Sampling
from server.engine.shares import Shares

BLOCK = 4
HOG, OTHER = 100, 200


class Running:
    """Requests that run, over a cache: each holds blocks for what it has computed."""

    def __init__(self, num_blocks: int = 100) -> None:
        self.cache = KVCache(num_blocks, BLOCK)
        self.requests: list[Request] = []

    def new(self, group: int, *lengths: int, max_tokens: int = 1) -> Request:
        lanes = [LaneSpec([1] * length) for length in lengths or (1,)]
        return Request(len(self.requests), lanes, max_tokens, Sampling(), group=group)

    def start(self, group: int, *lengths: int, computed: int = 1000) -> Request:
        request = self.new(group, *lengths)
        assert self.cache.grow(request.divide(computed))
        self.requests.append(request)
        return request

    def shares(self, num_groups: int = 2, max_running: int = 8) -> Shares:
        return Shares(self.requests, num_groups, max_running, self.cache)


@pytest.mark.parametrize(
    ("num_groups", "max_running", "places"), [(2, 8, 4), (3, 8, 2), (4, 8, 2), (2, 9, 4), (9, 8, 1), (2, 1, 1)]
)
def test_a_group_may_keep_an_nth_of_the_places_and_at_least_one(num_groups: int, max_running: int, places: int) -> None:
    running = Running()
    for number in range(places):
        shares = running.shares(num_groups, max_running)
        assert not shares.is_used_up(HOG), number
        assert shares.has_room_for(running.new(HOG), 1)
        running.start(HOG)
    shares = running.shares(num_groups, max_running)
    assert shares.is_used_up(HOG) and not shares.has_room_for(running.new(HOG), 1)
    assert not shares.is_used_up(OTHER) and shares.has_room_for(running.new(OTHER), 1)


@pytest.mark.parametrize(("num_groups", "num_blocks", "blocks"), [(2, 20, 10), (2, 21, 10), (3, 20, 6), (5, 20, 4)])
def test_a_group_may_keep_an_nth_of_the_blocks(num_groups: int, num_blocks: int, blocks: int) -> None:
    running = Running(num_blocks)
    running.start(HOG, (blocks - 1) * BLOCK)
    shares = running.shares(num_groups, max_running=80)
    assert not shares.is_used_up(HOG)
    assert shares.has_room_for(running.new(HOG), 1) and not shares.has_room_for(running.new(HOG), 2)
    running.start(HOG)
    assert running.shares(num_groups, max_running=80).is_used_up(HOG)


def test_a_request_counts_with_the_blocks_of_all_its_tokens_and_a_place_for_each_lane() -> None:
    running = Running(20)
    request = running.start(HOG, 5 * BLOCK, 4 * BLOCK, computed=BLOCK + 1)
    shares = running.shares()
    assert shares.num_blocks_of(request) == 9
    assert running.cache.pool.num_free == 18 and shares.num_free_blocks == 11  # 7 of the 18 are spoken for
    assert shares.has_room_for(running.new(HOG, 1, 1), 1)
    assert not shares.has_room_for(running.new(HOG, 1, 1, 1), 1)  # 5 places of 4
    assert not shares.has_room_for(running.new(HOG), 2)  # 11 blocks of 10


def test_the_first_request_of_a_group_may_be_larger_than_its_share() -> None:
    running = Running(20)
    running.start(HOG)
    shares = running.shares()
    wide, long = [1] * 5, [15 * BLOCK]
    for lengths, blocks in ((wide, 5), (long, 15)):
        assert shares.has_room_for(running.new(OTHER, *lengths), blocks)
        assert not shares.has_room_for(running.new(HOG, *lengths), blocks)


def test_what_a_group_holds_is_counted_as_its_requests_start_and_stop() -> None:
    running = Running(20)
    request = running.start(HOG, 9 * BLOCK, 1, computed=BLOCK)
    before = running.shares()
    request = running.requests.pop()
    shares = running.shares()
    for _ in range(2):
        shares.take(request)
        assert shares.is_used_up(HOG) and before.is_used_up(HOG)
        assert shares.num_free_blocks == before.num_free_blocks == 10
        shares.give_back(request)
        assert not shares.is_used_up(HOG)
        assert shares.num_free_blocks == 19  # it still holds one
        assert shares.has_room_for(running.new(HOG, 1, 1, 1, 1), 10)


@pytest.mark.parametrize("num_groups", [0, 1])
def test_a_group_alone_may_use_everything_and_nothing_is_taken_from_it(num_groups: int) -> None:
    running = Running(8)
    for _ in range(8):
        running.start(HOG)
    shares = running.shares(num_groups)
    assert not shares.is_used_up(HOG) and not list(shares.beyond())
    assert list(running.shares(2).beyond())


def test_what_is_beyond_a_share_is_taken_newest_first_and_the_share_is_left() -> None:
    running = Running()
    started = [running.start(group) for group in (HOG, OTHER, HOG, HOG, OTHER, HOG, HOG, HOG)]
    hog = [request for request in started if request.group == HOG]
    assert list(running.shares().beyond()) == [hog[5], hog[4]]
    assert list(running.shares(num_groups=4).beyond()) == [hog[5], hog[4], hog[3], hog[2]]
    shares = running.shares()
    assert list(shares.beyond()) == list(shares.beyond())  # to ask takes nothing
    shares.give_back(hog[5])
    assert not shares.is_used_up(OTHER) and shares.is_used_up(HOG)


def test_blocks_beyond_a_share_are_taken_though_its_places_are_not_used_up() -> None:
    running = Running(20)
    requests = [running.start(HOG, 5 * BLOCK) for _ in range(4)]
    assert list(running.shares().beyond()) == [requests[3], requests[2]]
    running = Running(20)
    requests = [running.start(HOG, 5 * BLOCK - 1), running.start(HOG, 4 * BLOCK), running.start(HOG, 5 * BLOCK)]
    assert list(running.shares().beyond()) == []  # it would be left with 9 of 10


def test_the_oldest_of_a_group_is_never_taken() -> None:
    running = Running(40)
    running.start(HOG, 1, 1, 1, 1, 1, 1, 1, 1)
    running.start(OTHER, 30 * BLOCK)
    assert list(running.shares(num_groups=20).beyond()) == []


def test_where_a_groups_newest_is_within_its_share_none_of_its_older_ones_are_taken() -> None:
    running = Running()
    running.start(HOG)
    running.start(HOG)  # without this one it would have 4 of 4 places
    running.start(HOG, 1, 1, 1)
    other = [running.start(OTHER) for _ in range(5)]
    assert list(running.shares().beyond()) == [other[-1]]


def test_one_may_pass_those_that_wait_if_there_is_room_to_its_very_end() -> None:
    running = Running(10)
    running.start(HOG, 6 * BLOCK, computed=1)
    shares = running.shares()
    assert shares.num_free_blocks == 4
    assert shares.lets_pass(running.new(OTHER, BLOCK, max_tokens=3 * BLOCK + 1))
    assert not shares.lets_pass(running.new(OTHER, BLOCK, max_tokens=3 * BLOCK + 2))
