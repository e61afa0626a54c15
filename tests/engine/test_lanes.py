"""Requests of several lanes, steps that give several tokens or none, and what ends while a step is under way."""

import pytest

from server.engine.fake_masks import FakeMasks
from server.engine.fake_runner import FakeResidency, FakeRunner, Known, expected_tokens
from server.engine.plan import Output, Plan
from server.engine.request import FinishReason, Lane, LaneSpec, Token
from tests.support.fake_engine import BLOCK, FakeEngine


def test_lanes_reach_their_ends_together_and_continue_with_what_the_first_says() -> None:
    setup = FakeEngine(tokens_per_step=8)
    ref = setup.adapter("second voice")
    answer = setup.add(list(range(12)), 3, beside=[LaneSpec([7, 8], ref), LaneSpec([9] * 5)])
    by_step: list[list[tuple[int, int, bool]]] = []
    while not setup.is_done:
        by_step.append([(it.lane.prompt_len, it.num_tokens, it.samples) for it in setup.step()])
    assert by_step[0] == [(12, 8, False)]
    assert by_step[1] == [(12, 3, False), (2, 1, False), (5, 4, False)]  # all but the last token of each
    assert by_step[2:] == [[(12, 1, True), (2, 1, False), (5, 1, False)]] * 3
    assert answer.tokens == expected_tokens(None, list(range(12)), 3, 1000)
    assert setup.kv_cache.pool.num_free == 50 and setup.residency.report()[0].pins == 0


def test_a_place_is_one_lanes() -> None:
    setup = FakeEngine(max_running=4)
    wide = [setup.add([number], 20, beside=[LaneSpec([number])] * 2) for number in range(2)]
    narrow = setup.add([5], 20)
    assert set(setup.computed()) == {wide[0].id, narrow.id}
    refused = setup.add([1], 1, beside=[LaneSpec([1])] * 4)
    setup.step()
    assert refused.error == "5 lanes of one request; 4 run together"


def test_a_request_that_wants_no_token_ends_once_its_prompt_is_computed() -> None:
    setup = FakeEngine(tokens_per_step=16)
    answer = setup.add([3] * 20, 0)
    setup.step()
    assert answer.finish is None
    setup.step()
    assert answer.finish is FinishReason.LENGTH and not answer.tokens and setup.is_done


class Talkative(FakeRunner):
    """Says three tokens at a time, the right ones."""

    def launch(self, plan: Plan) -> Known:
        said = super().launch(plan).outputs()
        return Known(
            {lane: Output((*output.tokens, *self._more(lane, output.tokens[0].id))) for lane, output in said.items()}
        )

    def _more(self, lane: Lane, token: int) -> list[Token]:
        return [Token(it) for it in expected_tokens(lane.adapter, [*lane.tokens, token], 2, 1000)]


@pytest.mark.parametrize(("max_tokens", "steps"), [(3, 1), (7, 3)])
def test_several_tokens_of_one_step_end_where_one_of_them_ends_the_request(max_tokens: int, steps: int) -> None:
    setup = FakeEngine(runner=Talkative(50, BLOCK))
    answer = setup.add([1, 2], max_tokens)
    while not setup.is_done:
        setup.step()
        steps -= 1
    assert steps == 0 and answer.finish is FinishReason.LENGTH
    assert answer.tokens == expected_tokens(None, [1, 2], max_tokens, 1000)


def test_what_ends_between_a_launch_and_its_answer_is_not_heard_of_again() -> None:
    setup = FakeEngine()
    gone, other = setup.add([1] * 9, 5), setup.add([2], 5)
    setup.step()
    scheduler = setup.scheduler
    plan, _ = scheduler.schedule()
    scheduler.advance(plan)
    assert all(scheduled.lane.num_uncomputed_tokens == 0 for scheduled in plan)  # the next plan may count on it
    ahead, _ = scheduler.schedule()
    assert ahead == []  # nothing is left to compute until it is known what the step says
    assert scheduler.abort(gone.id) is not None
    events = scheduler.record(plan, {scheduled.lane: Output((Token(7),)) for scheduled in plan})
    assert [event.request_id for event in events] == [other.id]
    setup.engine.check()


def test_with_a_step_in_flight_lanes_go_on_with_a_token_that_is_not_known() -> None:
    masks = FakeMasks()
    setup = FakeEngine(runner=FakeRunner(50, BLOCK, masks=masks), masks=masks, overlaps=True)
    long, last, constrained = setup.add([1] * 9, 5), setup.add([2], 1), setup.add([3], 5, grammar="grammar")
    setup.step()
    scheduler = setup.scheduler
    ahead, _ = scheduler.schedule()
    assert [(it.lane.request.id, it.start, it.num_tokens, it.is_fed_back) for it in ahead] == [(long.id, 9, 1, True)]
    assert not last.tokens and not constrained.tokens  # one has no next token, and of the other its mask depends on it
    setup.run(10)
    assert [len(it.tokens) for it in (long, last, constrained)] == [5, 1, 5]


def test_what_is_computed_beyond_an_end_is_not_heard_of() -> None:
    """That a token ends its request is not known before the step behind it is launched."""
    setup = FakeEngine(overlaps=True)
    stops = frozenset(expected_tokens(None, [5], 9, 1000)[2:3])
    stopped, aborted = setup.add([5], 9, stop_token_ids=stops), setup.add([6], 9)
    for _ in range(3):
        setup.step()
    setup.abort(aborted)
    computed = [len(setup.step()) for _ in range(4)]
    assert computed == [1, 0, 0, 0]
    assert stopped.finish is FinishReason.STOP and len(stopped.tokens) == 3
    assert aborted.finish is FinishReason.ABORT and len(aborted.tokens) == 2
    assert setup.kv_cache.pool.num_held == 0


@pytest.mark.parametrize(("slots", "requests", "adapters"), [(3, 2, 3), (3, 3, 2), (4, 2, 3), (5, 4, 3), (6, 4, 4)])
@pytest.mark.parametrize("polls", [0, 1, 3])
def test_requests_of_several_adapters_do_not_evict_each_others(
    slots: int, requests: int, adapters: int, polls: int
) -> None:
    """As long as one of them lacks an adapter, what was loaded for it is idle, and must not make room for others."""
    setup = FakeEngine(residency=FakeResidency(slots, polls), max_running=32)
    refs = [[setup.adapter(f"{request}.{index}") for index in range(adapters)] for request in range(requests)]
    answers = [setup.add([1, 2], 3, first, beside=[LaneSpec([3], ref) for ref in others]) for first, *others in refs]
    for _ in range(100):
        setup.step()
    assert all(answer.finish is FinishReason.LENGTH for answer in answers)


def test_adapters_that_never_fit_together_are_refused_and_wall_nobody() -> None:
    setup = FakeEngine(slots=1)
    first, second, third = (setup.adapter(name) for name in "abc")
    impossible = setup.add([1], 3, first, beside=[LaneSpec([2], second)])
    twice = setup.add([1], 3, first, beside=[LaneSpec([2], first)])  # one adapter, though two lanes name it
    other = setup.add([3], 3, third)
    setup.run(20)
    assert impossible.error == "2 adapters for 1 slots"
    assert twice.finish is other.finish is FinishReason.LENGTH
    assert not any(on_device.pins for on_device in setup.residency.report())


def test_several_lanes_need_their_blocks_each() -> None:
    setup = FakeEngine(blocks=3)
    refused = setup.add([1] * 5, 1, beside=[LaneSpec([2] * 5)])
    setup.step()
    assert refused.error == "prompt (10 tokens) and max_tokens (1) need 16 tokens of KV cache; there are 12"
