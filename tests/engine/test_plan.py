"""A plan as it takes shape: what it says of each lane, and what is left of its budget."""

from server.engine.plan import Draft, Scheduled
from server.engine.request import LaneSpec, Request, Sampling


def request(number: int, *lengths: int) -> Request:
    return Request(number, [LaneSpec([1] * length) for length in lengths], 4, Sampling())


def test_only_the_first_lane_samples_and_only_where_all_come_to_their_ends() -> None:
    draft = Draft(20)
    whole, cut = request(1, 5, 2), request(2, 9)
    whole.lanes[0].num_computed_tokens = 3
    draft.add(whole, whole.divide(20))
    draft.add(cut, cut.divide(6))
    assert draft.plan == [
        Scheduled(whole.lanes[0], 3, 2, True),
        Scheduled(whole.lanes[1], 0, 2, False),
        Scheduled(cut.first, 0, 6, False),
    ]
    assert draft.cut == [cut]
    assert draft.budget == 10 and draft.num_lanes == 3
    assert draft.num_tokens(whole) == 4 and draft.num_tokens(cut) == 6


def test_what_is_dropped_gives_its_tokens_and_its_lanes_back() -> None:
    draft = Draft(20)
    stays, goes = request(1, 3), request(2, 5, 4)
    for it in (stays, goes):
        draft.add(it, it.divide(20))
    assert draft.budget == 8 and draft.num_lanes == 3 and goes in draft
    for _ in range(2):  # the second time there is nothing to drop
        draft.drop(goes)
        assert goes not in draft and stays in draft
        assert draft.budget == 17 and draft.num_lanes == 1 and draft.num_tokens(goes) == 0
        assert [scheduled.lane for scheduled in draft.plan] == [stays.first]


def test_a_new_draft_is_empty() -> None:
    draft = Draft(7)
    assert draft.budget == 7 and draft.num_lanes == 0 and draft.cut == [] and draft.plan == []
    assert request(1, 1) not in draft and draft.num_tokens(request(1, 1)) == 0
