"""What requests ask of their prompts: which tokens are computed for it, in how many steps, and that it is told once."""

import pytest

from server.engine.fake_model import expected_logprobs, expected_of_prompt
from server.engine.kv_cache import KVCache
from server.engine.plan import Draft, Scheduled
from server.engine.request import FinishReason, LaneSpec, OfPrompt, Pooling, Request, Sampling
from tests.support.fake_engine import BLOCK, FakeEngine

VOCAB = 1000


def request(*lengths: int, of_prompt: OfPrompt | None = None, max_tokens: int = 4) -> Request:
    lanes = [LaneSpec([1] * length) for length in lengths]
    return Request(sum(lengths), lanes, max_tokens, Sampling(), of_prompt=of_prompt)


def test_what_asks_for_nothing_asks_for_nothing() -> None:
    assert request(3, of_prompt=OfPrompt()).of_prompt is None
    for asks in (OfPrompt(0), OfPrompt(pooling="last")):
        it = request(3, of_prompt=asks)
        assert it.untold is it.of_prompt is asks
        it.append(7)
        assert it.untold is None


# (what is asked, start, tokens, samples) of a prompt of 9 -> positions whose logits are wanted, and whether one chooses
WANTED = [
    (None, 0, 5, False, [], False),
    (None, 5, 4, True, [8], True),
    (OfPrompt(2), 0, 5, False, [0, 1, 2, 3, 4], False),
    (OfPrompt(2), 5, 4, True, [5, 6, 7, 8], True),
    (OfPrompt(0), 8, 1, True, [8], True),
    (OfPrompt(pooling="mean"), 0, 5, False, [], False),
    (OfPrompt(pooling="last"), 5, 4, True, [], False),
    (OfPrompt(2, "mean"), 0, 5, False, [0, 1, 2, 3, 4], False),
    (OfPrompt(2, "last"), 5, 4, True, [5, 6, 7], False),
    (OfPrompt(2, "last"), 8, 1, True, [], False),
]


@pytest.mark.parametrize(("asks", "start", "count", "samples", "positions", "chooses"), WANTED)
def test_the_logits_that_are_wanted(
    asks: OfPrompt | None, start: int, count: int, samples: bool, positions: list[int], chooses: bool
) -> None:
    scheduled = Scheduled(request(9, of_prompt=asks).first, start, count, samples)
    assert list(scheduled.logit_positions) == positions and scheduled.chooses is chooses
    assert scheduled.pools is (asks is not None and asks.pooling is not None)


def test_only_the_first_lanes_prompt_is_told_of_and_only_until_it_is() -> None:
    it = request(9, 9, of_prompt=OfPrompt(2))
    first, second = it.lanes
    assert Scheduled(first, 0, 5, False).of_prompt and not Scheduled(second, 0, 5, False).of_prompt
    assert list(Scheduled(second, 0, 5, False).logit_positions) == []
    it.append(7)  # and then it was preempted, and is computed anew
    assert Scheduled(first, 0, 10, True).of_prompt is None
    assert list(Scheduled(first, 0, 10, True).logit_positions) == [9]


# -- how many logits a step holds ---


def test_prompts_that_are_told_of_share_a_bound() -> None:
    draft = Draft(100, logits=10)
    told, other, plain = (request(length, of_prompt=OfPrompt(1)) for length in (30, 31, 32))
    plain.of_prompt = None
    draft.add(told, draft.divide(told, 7))
    assert draft.divide(told, 50) == [(told.first, 10)]  # its own 7 among them
    assert draft.divide(other, 50) == [(other.first, 3)]
    draft.add(other, draft.divide(other, 50))
    assert draft.divide(other, 50) == [(other.first, 3)]
    assert draft.divide(request(5, of_prompt=OfPrompt(1)), 50)[0][1] == 1  # one for each lane there always is
    assert draft.divide(plain, 50) == [(plain.first, 32)]
    assert draft.divide(request(40, of_prompt=OfPrompt(pooling="mean")), 50)[0][1] == 40  # no logits are wanted
    draft.drop(told)
    assert draft.divide(other, 50) == [(other.first, 10)]
    told.append(1)  # it was told
    draft.add(told, draft.divide(told, 50))
    assert draft.num_tokens(told) == 31 and draft.divide(other, 50) == [(other.first, 10)]


def test_many_lanes_come_to_their_ends_beyond_the_bound() -> None:
    """They do so in one step, in which each has a token."""
    draft, it = Draft(100, logits=2), request(3, 2, 2, of_prompt=OfPrompt(1))
    for _ in range(20):
        chunks = draft.divide(it, 100)
        assert chunks and sum(count for _, count in chunks) <= 3
        if sum(count for _, count in chunks) == it.num_uncomputed_tokens:
            return
        for lane, count in chunks:
            lane.num_computed_tokens += count
    raise AssertionError("they never come to their ends")


@pytest.mark.parametrize("logits", [1, 3, 100])
def test_told_in_as_many_steps_as_it_takes(logits: int) -> None:
    engine = FakeEngine(logits_per_step=logits)
    prompts = [list(range(start, start + 20)) for start in (0, 100, 200)]
    asks = [OfPrompt(2), None, OfPrompt(0)]
    answers = [engine.add(prompt, 3, of_prompt=it) for prompt, it in zip(prompts, asks, strict=True)]
    for _ in range(70):
        plan = engine.step()
        assert sum(len(it.logit_positions) for it in plan) <= logits + len(plan)
    for answer, ask in zip(answers, asks, strict=True):
        assert answer.finish is FinishReason.LENGTH
        assert answer.told == (ask and expected_of_prompt(None, answer.prompt, ask, VOCAB))


# -- what the prefix cache knows ---


@pytest.mark.parametrize(("asks", "cached"), [(None, 8), (OfPrompt(0), 0), (OfPrompt(pooling="mean"), 0),
                                              (OfPrompt(1, "last"), 0), (OfPrompt(pooling="last"), 8)])  # fmt: skip
def test_a_cached_prefix_serves_where_not_all_tokens_are_needed(asks: OfPrompt | None, cached: int) -> None:
    cache = KVCache(20, BLOCK)
    before = request(9)
    assert cache.grow(before.divide(9))
    cache.commit(before.first, 9)
    it = request(9, 9, of_prompt=asks, max_tokens=0)
    cache.attach_prefix(it)
    assert [lane.num_computed_tokens for lane in it.lanes] == [cached, 8]  # the lane beside it is not told of
    cache.check([before, it])


def test_what_was_computed_to_be_told_serves_others() -> None:
    engine = FakeEngine()
    first = engine.add([5] * 9, 0, of_prompt=OfPrompt(1, "mean"))
    engine.run(2)
    second = engine.add([5] * 9, 1)
    engine.run(2)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    assert first.told and first.told.vector


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_what_is_pooled_ends_without_a_token(pooling: Pooling) -> None:
    engine = FakeEngine(tokens_per_step=4)
    adapter = engine.adapter("a")
    answers = [engine.add(list(range(9)), 0, it, of_prompt=OfPrompt(pooling=pooling)) for it in (None, adapter)]
    engine.run(10)
    for answer in answers:
        assert answer.finish is FinishReason.LENGTH and not answer.tokens
        assert answer.told == expected_of_prompt(answer.adapter, answer.prompt, OfPrompt(pooling=pooling), VOCAB)
    assert answers[0].told != answers[1].told


def test_each_token_says_how_probable_it_was() -> None:
    engine = FakeEngine()
    answer = engine.add([5, 6], 3, sampling=Sampling(num_logprobs=2))
    engine.run(5)
    assert answer.logprobs == expected_logprobs(None, [5, 6, *answer.tokens], 2, 2, VOCAB)
    assert [it.rank for it in answer.logprobs if it] == [1, 1, 1]
