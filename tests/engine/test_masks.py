"""Requests whose tokens a grammar constrains: masks that are late, requests that give way, grammars that break."""

import pytest

from server.engine.core import Pace
from server.engine.fake_masks import TOO_MUCH, FakeMasks, expected_under, is_allowed
from server.engine.fake_runner import FakeRunner, expected_tokens
from server.engine.request import Fault, FinishReason, OfPrompt
from tests.support.fake_engine import BLOCK, FakeEngine

VOCAB = 50


def engine(most_looks: int = 0, blocks: int = 100, seed: int = 0, masks: FakeMasks | None = None) -> FakeEngine:
    masks = masks or FakeMasks(VOCAB, most_looks, seed)
    return FakeEngine(blocks, runner=FakeRunner(blocks, BLOCK, VOCAB, masks), masks=masks)


def test_every_token_is_one_that_its_grammar_allows() -> None:
    it = engine()
    answer = it.add([1, 2, 3], 12, grammar="one")
    it.run()
    assert answer.tokens == expected_under("one", None, [1, 2, 3], 12, VOCAB)
    assert all(is_allowed("one", answer.tokens[:at], token) for at, token in enumerate(answer.tokens))
    assert answer.tokens != expected_tokens(None, [1, 2, 3], 12, VOCAB)


@pytest.mark.parametrize("seed", range(8))
def test_late_masks_change_no_token_of_anybody(seed: int) -> None:
    it = engine(most_looks=6, seed=seed)
    late = [it.add([7, seed, number], 20, grammar=f"grammar {number}") for number in range(2)]
    others = [it.add([8, seed, number], 20) for number in range(3)]
    it.run()
    for number, answer in enumerate(late):
        assert answer.tokens == expected_under(f"grammar {number}", None, [7, seed, number], 20, VOCAB)
    for number, answer in enumerate(others):
        assert answer.tokens == expected_tokens(None, [8, seed, number], 20, VOCAB)


def test_a_lane_whose_mask_is_late_waits_alone() -> None:
    it = engine(most_looks=50)
    it.add([1, 2, 3], 5, grammar="slow")
    other = it.add([4, 5], 10)
    steps = 0
    while other.finish is None:
        it.step()
        steps += 1
    assert steps <= 12  # its own ten tokens, one a step
    it.run()


def test_who_has_nothing_to_do_but_to_wait_is_asked_again_very_soon() -> None:
    class Never(FakeMasks):
        def is_ready(self, request_id: int) -> bool:
            return False

    it = engine(masks=Never(VOCAB))
    it.add([1, 2, 3], 5, grammar="never")
    for _ in range(3):
        it.step()
    assert it.engine.pace is Pace.AWAITING_MASKS
    assert it.scheduler.awaits_masks
    it.scheduler.check()


def test_who_gives_way_goes_on_where_the_grammar_was() -> None:
    it = engine(most_looks=3, blocks=14)
    answers = [it.add([number, 1, 2], 20, grammar=f"grammar {number}") for number in range(4)]
    it.run()
    assert it.scheduler.num_preemptions > 0
    for number, answer in enumerate(answers):
        assert answer.tokens == expected_under(f"grammar {number}", None, [number, 1, 2], 20, VOCAB)


def test_what_is_told_of_a_prompt_waits_for_the_first_token() -> None:
    it, plain = engine(most_looks=9, seed=3), engine()
    asked = OfPrompt(num_logprobs=2)
    answer = it.add([1, 2, 3, 4, 5, 6], 4, grammar="one", of_prompt=asked)
    expected = plain.add([1, 2, 3, 4, 5, 6], 4, of_prompt=asked)
    it.run()
    plain.run()
    assert answer.told == expected.told is not None
    assert answer.tokens == expected_under("one", None, [1, 2, 3, 4, 5, 6], 4, VOCAB)


def test_a_grammar_that_breaks_ends_its_own_request() -> None:
    masks = FakeMasks(VOCAB, most_looks=2)
    it = engine(masks=masks)
    broken, other = it.add([1, 2], 20, grammar=f"{TOO_MUCH}5"), it.add([3, 4], 20, grammar="fine")
    it.run()
    assert (broken.finish, broken.fault) == (FinishReason.ERROR, Fault.GRAMMAR)
    assert len(broken.tokens) == 5
    assert other.tokens == expected_under("fine", None, [3, 4], 20, VOCAB)
    assert masks.num_open() == 0


def test_nothing_stays_open_of_who_leaves() -> None:
    masks = FakeMasks(VOCAB, most_looks=4)
    it = engine(masks=masks)
    answers = [it.add([number, 1], 30, grammar="one") for number in range(8)]
    for _ in range(5):
        it.step()
    for answer in answers:
        it.abort(answer)
    it.run()
    assert masks.num_open() == 0


def test_what_generates_nothing_needs_no_masks() -> None:
    masks = FakeMasks(VOCAB)
    it = engine(masks=masks)
    answer = it.add([1, 2, 3], 0, grammar="one")
    it.run()
    assert answer.finish is FinishReason.LENGTH


def test_who_leaves_when_its_grammar_has_just_broken_is_told_of_nothing() -> None:
    """The engine is: it was not asked since, and what it hears then is of nobody any more."""
    masks = FakeMasks(VOCAB)
    it = engine(masks=masks)
    answer, other = it.add([1, 2], 20, grammar=f"{TOO_MUCH}0"), it.add([3, 4], 9, grammar="fine")
    it.step()  # it is opened, and breaks when the step collects
    assert masks.num_open() == 1
    it.abort(answer)
    it.run()
    assert answer.finish is FinishReason.ABORT
    assert other.tokens == expected_under("fine", None, [3, 4], 9, VOCAB)


def test_who_gives_way_when_its_grammar_has_just_broken_is_asked_about_anew() -> None:
    masks = FakeMasks(VOCAB)
    masks.open(1, f"{TOO_MUCH}0", [])
    masks.collect([1], lambda: False, may_wait=False)
    masks.close(1)
    masks.open(1, "fine", [])
    assert masks.poll() == []
