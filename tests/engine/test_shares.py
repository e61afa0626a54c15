"""What adapters and groups may keep while others want it, and what is taken back from those that hold more."""

import pytest

from adapters_store.ref import AdapterRef
from server.engine.at_work import AtWork
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

    def new(self, group: int, *lengths: int, max_tokens: int = 1, adapter: str = "", weight: float = 1.0) -> Request:
        ref = AdapterRef(adapter, adapter, "lora") if adapter else None
        lanes = [LaneSpec([1] * length, ref) for length in lengths or (1,)]
        return Request(len(self.requests), lanes, max_tokens, Sampling(), group=group, weight=weight)

    def start(self, group: int, *lengths: int, computed: int = 1000, adapter: str = "") -> Request:
        request = self.new(group, *lengths, adapter=adapter)
        assert self.cache.grow(request.divide(computed))
        self.requests.append(request)
        return request

    def shares(self, num_groups: int = 2, max_running: int = 8) -> Shares:
        """HOG, OTHER and more groups of the base are at work, so many in all."""
        at_work = AtWork()
        for group in (HOG, OTHER, *range(1, num_groups))[:num_groups]:
            at_work.add(self.new(group))
        return Shares(self.requests, at_work, max_running, self.cache)

    def shares_of(
        self, groups: dict[str, int], max_running: int = 8, weights: dict[str, float] | None = None
    ) -> Shares:
        """So many groups of each adapter are at work, numbered from 0."""
        at_work = AtWork()
        for adapter, num_groups in groups.items():
            for group in range(num_groups):
                at_work.add(self.new(group, adapter=adapter, weight=(weights or {}).get(adapter, 1.0)))
        return Shares(self.requests, at_work, max_running, self.cache)


def is_used_up(shares: Shares, group: int) -> bool:
    return shares.is_used_up(("", group))


def has_room_for(shares: Shares, request: Request, num_blocks: int) -> bool:
    """Whether the request may take what groups of its own adapter hold beyond their shares."""
    return shares._has_room((request.account, request.group), request, num_blocks)


@pytest.mark.parametrize(
    ("num_groups", "max_running", "places"), [(2, 8, 4), (3, 8, 2), (4, 8, 2), (2, 9, 4), (9, 8, 1), (2, 1, 1)]
)
def test_a_group_may_keep_an_nth_of_the_places_and_at_least_one(num_groups: int, max_running: int, places: int) -> None:
    running = Running()
    for number in range(places):
        shares = running.shares(num_groups, max_running)
        assert not is_used_up(shares, HOG), number
        assert has_room_for(shares, running.new(HOG), 1)
        running.start(HOG)
    shares = running.shares(num_groups, max_running)
    assert is_used_up(shares, HOG) and not has_room_for(shares, running.new(HOG), 1)
    assert not is_used_up(shares, OTHER) and has_room_for(shares, running.new(OTHER), 1)


@pytest.mark.parametrize(("num_groups", "num_blocks", "blocks"), [(2, 20, 10), (2, 21, 10), (3, 20, 6), (5, 20, 4)])
def test_a_group_may_keep_an_nth_of_the_blocks(num_groups: int, num_blocks: int, blocks: int) -> None:
    running = Running(num_blocks)
    running.start(HOG, (blocks - 1) * BLOCK)
    shares = running.shares(num_groups, max_running=80)
    assert not is_used_up(shares, HOG)
    assert has_room_for(shares, running.new(HOG), 1) and not has_room_for(shares, running.new(HOG), 2)
    running.start(HOG)
    assert is_used_up(running.shares(num_groups, max_running=80), HOG)


def test_a_request_counts_with_the_blocks_of_all_its_tokens_and_a_place_for_each_lane() -> None:
    running = Running(20)
    request = running.start(HOG, 5 * BLOCK, 4 * BLOCK, computed=BLOCK + 1)
    shares = running.shares()
    assert shares.num_blocks_of(request) == 9
    assert running.cache.pool.num_free == 18 and shares.num_free_blocks == 11  # 7 of the 18 are spoken for
    assert has_room_for(shares, running.new(HOG, 1, 1), 1)
    assert not has_room_for(shares, running.new(HOG, 1, 1, 1), 1)  # 5 places of 4
    assert not has_room_for(shares, running.new(HOG), 2)  # 11 blocks of 10


def test_the_first_request_of_a_group_may_be_larger_than_its_share() -> None:
    running = Running(20)
    running.start(HOG)
    shares = running.shares()
    wide, long = [1] * 5, [15 * BLOCK]
    for lengths, blocks in ((wide, 5), (long, 15)):
        assert has_room_for(shares, running.new(OTHER, *lengths), blocks)
        assert not has_room_for(shares, running.new(HOG, *lengths), blocks)


def test_what_a_group_holds_is_counted_as_its_requests_start_and_stop() -> None:
    running = Running(20)
    request = running.start(HOG, 9 * BLOCK, 1, computed=BLOCK)
    before = running.shares()
    request = running.requests.pop()
    shares = running.shares()
    for _ in range(2):
        shares.take(request)
        assert is_used_up(shares, HOG) and is_used_up(before, HOG)
        assert shares.num_free_blocks == before.num_free_blocks == 10
        shares.give_back(request)
        assert not is_used_up(shares, HOG)
        assert shares.num_free_blocks == 19  # it still holds one
        assert has_room_for(shares, running.new(HOG, 1, 1, 1, 1), 10)


@pytest.mark.parametrize("num_groups", [0, 1])
def test_a_group_alone_may_use_everything_and_nothing_is_taken_from_it(num_groups: int) -> None:
    running = Running(8)
    for _ in range(8):
        running.start(HOG)
    shares = running.shares(num_groups)
    assert not is_used_up(shares, HOG) and not list(shares.beyond(""))
    assert list(running.shares(2).beyond(""))


def test_what_is_beyond_a_share_is_taken_newest_first_and_the_share_is_left() -> None:
    running = Running()
    started = [running.start(group) for group in (HOG, OTHER, HOG, HOG, OTHER, HOG, HOG, HOG)]
    hog = [request for request in started if request.group == HOG]
    assert list(running.shares().beyond("")) == [hog[5], hog[4]]
    assert list(running.shares(num_groups=4).beyond("")) == [hog[5], hog[4], hog[3], hog[2]]
    shares = running.shares()
    assert list(shares.beyond("")) == list(shares.beyond(""))  # to ask takes nothing
    shares.give_back(hog[5])
    assert not is_used_up(shares, OTHER) and is_used_up(shares, HOG)


def test_blocks_beyond_a_share_are_taken_though_its_places_are_not_used_up() -> None:
    running = Running(20)
    requests = [running.start(HOG, 5 * BLOCK) for _ in range(4)]
    assert list(running.shares().beyond("")) == [requests[3], requests[2]]
    running = Running(20)
    requests = [running.start(HOG, 5 * BLOCK - 1), running.start(HOG, 4 * BLOCK), running.start(HOG, 5 * BLOCK)]
    assert list(running.shares().beyond("")) == []  # it would be left with 9 of 10


def test_the_oldest_of_a_group_is_never_taken() -> None:
    running = Running(40)
    running.start(HOG, 1, 1, 1, 1, 1, 1, 1, 1)
    running.start(OTHER, 30 * BLOCK)
    assert list(running.shares(num_groups=20).beyond("")) == []


def test_where_a_groups_newest_is_within_its_share_none_of_its_older_ones_are_taken() -> None:
    running = Running()
    running.start(HOG)
    running.start(HOG)  # without this one it would have 4 of 4 places
    running.start(HOG, 1, 1, 1)
    other = [running.start(OTHER) for _ in range(5)]
    assert list(running.shares().beyond("")) == [other[-1]]


def test_one_may_pass_those_that_wait_if_there_is_room_to_its_very_end() -> None:
    running = Running(10)
    running.start(HOG, 6 * BLOCK, computed=1)
    shares = running.shares()
    assert shares.num_free_blocks == 4
    assert shares.lets_pass(running.new(OTHER, BLOCK, max_tokens=3 * BLOCK + 1))
    assert not shares.lets_pass(running.new(OTHER, BLOCK, max_tokens=3 * BLOCK + 2))


# -- adapters -----------------------------------------------------------


def kept(
    running: Running, groups: dict[str, int], weights: dict[str, float] | None = None, places: int = 8
) -> list[int]:
    """How many places each adapter may keep."""
    shares = running.shares_of(groups, places, weights)
    counts = []
    for adapter in groups:
        there: list[Request] = []
        while not shares.is_used_up(adapter) and len(there) < 100:
            there.append(running.new(0, adapter=adapter))
            shares.take(there[-1])
        counts.append(len(there))
        for request in there:
            shares.give_back(request)
    return counts


def test_an_adapter_may_keep_its_part_by_weight_however_many_groups_it_has_and_at_least_one_place() -> None:
    running = Running()
    assert kept(running, {"a": 1}) == [100]  # alone
    assert kept(running, {"a": 1000, "b": 1}) == [4, 4]
    assert kept(running, {"a": 5, "": 1, "c": 1}, {"a": 0.5, "": 1.5, "c": 2.0}) == [1, 3, 4]
    assert kept(running, {"a": 1, "b": 1, "c": 1}, {"a": 0.1, "b": 0.1, "c": 0.1}, places=9) == [3, 3, 3]
    assert kept(running, {"a": 1, "b": 1}, {"a": 1000.0, "b": 0.001}) == [7, 1]


def test_a_group_may_keep_an_equal_part_of_what_its_adapter_may() -> None:
    running = Running()
    for number in range(2):
        shares = running.shares_of({"a": 2, "b": 1})
        assert not shares.is_used_up(("a", 0)), number
        running.start(0, adapter="a")
    shares = running.shares_of({"a": 2, "b": 1})
    assert shares.is_used_up(("a", 0)) and not shares.is_used_up(("a", 1)) and not shares.is_used_up("a")
    assert not running.shares_of({"a": 1, "b": 1}).is_used_up(("a", 0))
    assert not shares.is_used_up(("b", 0))


def test_of_an_adapter_that_holds_too_much_the_groups_that_do_give_way_first_and_its_oldest_never() -> None:
    running = Running()
    old = running.start(0, adapter="a")
    hogs = [running.start(1, adapter="a") for _ in range(3)]
    others = [running.start(group, adapter="a") for group in (2, 3, 4, 5)]
    shares = running.shares_of({"a": 6, "b": 1})  # of 8 places each adapter may keep 4, each group of a one
    wants = running.new(0, adapter="b")
    assert list(shares.victims(wants, 1, 0)) == [hogs[2], hogs[1], others[3], others[2]]
    assert old not in list(shares.victims(wants, 1, 0))
    of_eight = running.shares_of({"a": 6, **dict.fromkeys("bcdefgh", 1)})
    assert list(of_eight.victims(wants, 1, 0)) == [hogs[2], hogs[1], *reversed(others), hogs[0]]


def test_an_adapter_within_its_share_is_asked_for_nothing_by_others_and_its_groups_by_its_own() -> None:
    running = Running()
    hogs = [running.start(0, adapter="a") for _ in range(4)]
    for _ in range(4):
        running.start(0, adapter="b")
    shares = running.shares_of({"a": 2, "b": 1})
    assert list(shares.victims(running.new(0, adapter="b"), 1, 0)) == []
    assert list(shares.victims(running.new(0, adapter="a"), 1, 0)) == []
    assert list(shares.victims(running.new(1, adapter="a"), 1, 0)) == [hogs[3], hogs[2]]
    assert shares.has_victims and shares.may_take("a", 0) and not shares.may_take("b", 0)
    assert list(shares.beyond("b")) == [] and list(shares.beyond("a")) == [hogs[3], hogs[2]]


def test_who_would_be_beyond_its_share_by_it_takes_nothing_but_the_first_of_an_adapter_may_be_large() -> None:
    running = Running(40)
    hogs = [running.start(0, 5 * BLOCK, adapter="a") for _ in range(8)]
    shares = running.shares_of({"a": 1, "b": 1}, max_running=16)  # 20 blocks each
    assert list(shares.victims(running.new(0, 30 * BLOCK, adapter="b"), 30, 0)) == [hogs[7], hogs[6], hogs[5], hogs[4]]
    shares.give_back(hogs.pop())
    running.requests.remove(hogs[-1])
    shares.take(running.new(0, 5 * BLOCK, adapter="b"))
    assert list(shares.victims(running.new(0, adapter="b"), 16, 0)) == []
    assert list(shares.victims(running.new(0, adapter="b"), 15, 0)) != []


def test_who_runs_and_grows_takes_from_those_beyond_their_share_and_of_no_other_who_is_within() -> None:
    running = Running()
    grows = running.start(0, adapter="a")
    hogs = [running.start(0, adapter="b") for _ in range(3)]
    running.start(1, adapter="b")
    groups = {"a": 1, "b": 2}
    assert list(running.shares_of(groups).beyond(grows.account)) == []  # b holds 4 of its 4, its group 3 of 2
    assert list(running.shares_of(groups).beyond("b")) == [hogs[2]]
    running.start(1, adapter="b")
    assert list(running.shares_of(groups).beyond(grows.account)) == [hogs[2]]


def test_nothing_is_taken_from_a_request_of_a_higher_priority() -> None:
    running = Running()
    hogs = [running.start(0, adapter="a") for _ in range(6)]
    hogs[5].priority, hogs[4].priority = 7, 2
    shares = running.shares_of({"a": 1, "b": 1})
    wants = running.new(0, adapter="b")
    assert [list(shares.victims(wants, 1, priority)) for priority in (1, 2, 7)] == [[], [hogs[4]], hogs[:3:-1]]
    assert [shares.may_take("b", priority) for priority in (1, 2)] == [False, True]
