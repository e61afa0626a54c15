"""What the scheduler promises, one promise a test. tests/engine/test_simulation.py proves that they hold together."""

import random
from typing import Any

import pytest

from adapters_store.ref import AdapterRef
from server.engine import kv_cache
from server.engine.fake_runner import FakeResidency, expected_tokens
from server.engine.kv_cache import chain_root
from server.engine.messages import AdapterGone
from server.engine.request import FinishReason, LaneSpec
from server.engine.residency import AdapterFailed, Wait
from tests.support.breadth import always
from tests.support.fake_engine import FakeEngine


def test_a_request_larger_than_the_cache_is_refused_with_the_numbers() -> None:
    setup = FakeEngine(blocks=5)
    refused = setup.add([1] * 18, 4)
    fits = setup.add([1] * 17, 4)  # the last token sampled is never computed
    setup.run()
    assert refused.finish is FinishReason.ERROR and not refused.tokens
    told = str(refused.error)
    assert "prompt (18 tokens) and max_tokens (4) need 21 tokens" in told and "there are 20" in told
    assert fits.finish is FinishReason.LENGTH and len(fits.tokens) == 4


def test_full_adapter_slots_do_not_block_base_requests_or_other_adapters() -> None:
    setup = FakeEngine(slots=1)
    first, second = setup.adapter("first"), setup.adapter("second")
    setup.add([1, 2, 3], 30, first)
    setup.step()
    blocked, base, same = setup.add([1], 4, second), setup.add([2], 4), setup.add([3], 4, first)
    computed = setup.computed()
    assert blocked.id not in computed and base.id in computed and same.id in computed


def test_one_that_starves_for_adapter_room_gets_it() -> None:
    """A steady stream for one adapter would keep its slot pinned for ever; after max_skips the stream is held back."""
    setup = FakeEngine(slots=1, max_skips=5)
    popular, rare = setup.adapter("popular"), setup.adapter("rare")
    setup.add([1], 6, popular)
    setup.step()
    starving = setup.add([2], 3, rare)
    for _ in range(40):
        setup.add([1], 6, popular)
        base = setup.add([3], 1)
        setup.step()
        assert base.finish is FinishReason.LENGTH  # nobody holds base requests back
        if starving.tokens:
            break
    assert starving.tokens


def test_a_long_prompt_takes_only_what_decoding_requests_leave() -> None:
    setup = FakeEngine(tokens_per_step=10)
    short = [setup.add([index], 20) for index in (1, 2)]
    setup.step()
    long = setup.add(list(range(40)), 4)
    for _ in range(4):
        computed = setup.computed()
        assert [computed[request.id] for request in short] == [1, 1] and computed[long.id] == 8


def test_the_same_prompt_through_two_adapters_shares_no_block() -> None:
    setup = FakeEngine()
    prompt = list(range(17))
    refs = [None, setup.adapter("a"), setup.adapter("b"), setup.adapter("a", "new weights")]
    for ref in refs:
        request = setup.add(prompt, 3, ref)
        setup.run(20)
        assert request.num_cached_tokens == 0
        assert request.tokens == expected_tokens(ref, prompt, 3, 1000)
    again = setup.add(prompt, 3, refs[1])
    setup.run(20)
    assert again.num_cached_tokens == 16
    assert len({chain_root(ref) for ref in refs}) == 4


def test_a_salt_changes_no_token_and_shares_no_block() -> None:
    setup = FakeEngine()
    prompt = list(range(17))
    for salt, cached in (("", 0), ("mine", 0), ("yours", 0), ("mine", 16), ("", 16)):
        request = setup.add(prompt, 3, salt=salt)
        setup.run(20)
        assert request.num_cached_tokens == cached
        assert request.tokens == expected_tokens(None, prompt, 3, 1000)


def test_a_cache_that_forgot_the_salt_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "chain_root", lambda adapter, salt: chain_root(adapter))
    setup = FakeEngine()
    setup.add(list(range(17)), 3, salt="mine")
    setup.run(20)
    setup.add(list(range(17)), 3, salt="yours")
    with pytest.raises(AssertionError, match="reads another prefix's KV"):
        setup.run(20)


def test_a_preempted_request_gives_the_same_answer() -> None:
    setup = FakeEngine(blocks=8)
    requests = [setup.add([index] * 9, 12) for index in range(3)]
    setup.run()
    assert setup.scheduler.num_preemptions > 0
    for index, request in enumerate(requests):
        assert request.tokens == expected_tokens(None, [index] * 9, 12, 1000)


def test_a_deleted_adapter_serves_its_requests_to_the_end_and_no_new_ones() -> None:
    setup = FakeEngine()
    ref = setup.adapter("gone")
    request = setup.add([1, 2], 10, ref)
    setup.step()
    setup.remove(ref)
    late = setup.add([1], 1, ref)
    setup.step()
    assert late.finish is FinishReason.ERROR and late.error == "the adapter 'gone' is no longer served"
    assert setup.residency.report() != ()
    setup.run(20)
    assert len(request.tokens) == 10 and setup.residency.report() == ()


def test_stop_tokens_end_a_request_and_aborts_free_everything() -> None:
    setup = FakeEngine()
    token = expected_tokens(None, [5], 3, 1000)[2]
    stopped = setup.add([5], 50, stop_token_ids=frozenset([token]))
    aborted = setup.add([6] * 9, 50)
    setup.run(6)
    assert stopped.tokens[-1] == token and len(stopped.tokens) == 3
    assert aborted.finish is None
    for _ in range(2):  # the second time there is nothing to end
        setup.abort(aborted)
    setup.step()
    assert aborted.finish is FinishReason.ABORT
    assert setup.kv_cache.pool.num_free == 50


class BrokenResidency(FakeResidency):
    """Every transfer fails."""

    def acquire(self, ref: AdapterRef) -> Any:
        raise AdapterFailed(ref, "the file is gone")


def test_an_adapter_that_fails_to_load_ends_all_its_requests_and_no_others() -> None:
    setup = FakeEngine(residency=BrokenResidency(1))
    ref = setup.adapter("broken")
    broken = [setup.add([1], 2, ref) for _ in range(3)]
    base = setup.add([2], 2)
    assert setup.computed() == {base.id: 1}
    for answer in broken:
        assert answer.finish is FinishReason.ERROR
        assert answer.error == "the adapter 'broken' could not be loaded: the file is gone"


def test_two_names_of_the_same_weights_share_everything_but_their_errors() -> None:
    setup = FakeEngine(slots=1)
    first, second = setup.adapter("first", "weights"), setup.adapter("second", "weights")
    prompt = list(range(9))
    answers = [setup.add(prompt, 3, ref) for ref in (first, second)]
    setup.step()
    assert [(it.ref, it.pins) for it in setup.residency.report()] == [(first, 2)]
    setup.run(5)
    again = setup.add(prompt, 3, second, beside=[LaneSpec([1], first)])
    setup.step()
    setup.remove(second)  # no name is left
    setup.step()
    late = [setup.add([1], 1, ref) for ref in (first, second)]
    setup.run(5)
    for answer in (*answers, again):
        assert answer.tokens == expected_tokens(first, prompt, 3, 1000)
    assert again.num_cached_tokens == 8
    assert [it.error for it in late] == [f"the adapter {name!r} is no longer served" for name in ("first", "second")]
    assert setup.gone == [AdapterGone(first, 1000)]


def test_a_failure_names_the_adapter_as_each_request_did() -> None:
    setup = FakeEngine(residency=BrokenResidency(1))
    refs = [setup.adapter(name, "weights") for name in ("first", "second")]
    answers = [setup.add([1], 2, refs[1]), setup.add([1], 2, beside=[LaneSpec([1], refs[0])])]
    setup.step()
    assert [it.error for it in answers] == [
        "the adapter 'second' could not be loaded: the file is gone",
        "the adapter 'first' could not be loaded: the file is gone",
    ]


def test_waiting_groups_take_turns_and_each_keeps_its_own_order() -> None:
    setup = FakeEngine(max_running=1)
    first = [setup.add([1], 1, group=100) for _ in range(3)]
    second = [setup.add([2], 1, group=200) for _ in range(2)]
    third = [setup.add([3], 1)]
    served = [request_id for _ in range(6) for request_id in setup.computed()]
    turns = [first[0], second[0], third[0], first[1], second[1], first[2]]
    assert served == [request.id for request in turns]


@pytest.mark.parametrize(
    ("hogs", "prompt_len", "blocks", "budget", "most_steps"),
    always([(1, 1, 2000, 32, 2), (1, 100, 2000, 32, 2), (1, 1, 60, 32, 2), (1, 100, 60, 32, 2), (1, 1, 2000, 16, 2),
            (3, 1, 2000, 32, 2), (3, 100, 2000, 32, 5)], (1, 100, 60, 32, 2), (3, 100, 2000, 32, 5)),
)  # fmt: skip
def test_beside_a_thousand_sequences_of_few_http_requests_a_small_one_ends_within_a_few_steps(
    hogs: int, prompt_len: int, blocks: int, budget: int, most_steps: int
) -> None:
    setup = FakeEngine(blocks=blocks, tokens_per_step=budget, max_running=16, max_waiting=5000)
    for hog in range(hogs):
        for _ in range(1024 // hogs):
            setup.add([7] * prompt_len, 100, group=10_000 + hog)
    rng = random.Random(0)
    waits: list[int] = []
    for _ in range(60):
        for _ in range(rng.randrange(5)):
            setup.step()
        small, steps = setup.add([rng.randrange(1000)], 1), 0
        while not len(small.tokens):
            setup.step()
            steps += 1
        waits.append(steps)
    assert max(waits) <= most_steps


def test_one_group_keeps_half_of_the_places_while_others_wait_and_all_of_them_alone() -> None:
    setup = FakeEngine(blocks=400, max_running=8)
    large = [setup.add([1], 60, group=100) for _ in range(20)]
    for _ in range(3):
        setup.step()
    assert sum(map(setup.is_running, large)) == 8
    others = [setup.add([2], 12, group=200) for _ in range(20)]
    setup.step()
    assert sum(map(setup.is_running, large)) == 4
    assert sum(map(setup.is_running, others)) == 4
    setup.run()
    setup.step()
    assert not setup.scheduler.has_requests
    for request in large:
        assert request.tokens == expected_tokens(None, [1], 60, 1000)


def test_a_request_larger_than_a_share_is_not_preempted_for_small_ones_again_and_again() -> None:
    setup = FakeEngine(blocks=20, max_running=8)
    large = setup.add([1] * 30, 30)  # 15 of 20 blocks
    for number in range(100):
        setup.add([number], 3)
        setup.step()
        if large.finish is not None:
            break
    assert len(large.tokens) == 30


def test_a_long_prompt_leaves_half_of_the_budget_to_prompts_behind_it_and_takes_what_they_leave() -> None:
    setup = FakeEngine(blocks=100, tokens_per_step=16)
    long = setup.add([1] * 200, 1)
    assert setup.computed() == {long.id: 16}
    other = setup.add([2] * 40, 1)
    assert setup.computed() == {long.id: 8, other.id: 8}
    short = setup.add([3], 1)
    assert setup.computed() == {
        long.id: 4,
        other.id: 8 + 3,
        short.id: 1,
    }  # the one that is nearer to its end goes first
    setup.add([4], 1, setup.adapter("not on the device"))
    setup.residency.acquire = lambda ref: Wait.LOADING  # type: ignore[method-assign]
    assert sum(setup.computed().values()) == 16


@pytest.mark.parametrize(
    ("groups", "each", "prompt_len", "max_tokens", "blocks", "most"),
    [(2, 2, 100, 60, 100, 1.2), (2, 4, 200, 200, 250, 1.5), (4, 8, 100, 100, 300, 1.6), (2, 16, 150, 40, 170, 1.5),
     (30, 1, 300, 30, 500, 1.1), (32, 1, 150, 40, 170, 1.2)],
)  # fmt: skip
def test_groups_that_are_short_of_blocks_do_not_take_them_from_each_other_in_turns(
    groups: int, each: int, prompt_len: int, max_tokens: int, blocks: int, most: float
) -> None:
    """Tokens computed for each that is needed; the rest is recomputed after preemptions."""
    setup = FakeEngine(blocks=blocks, tokens_per_step=64, max_running=16, max_waiting=1000)
    rng = random.Random(0)
    for group in range(groups):
        for _ in range(each):
            setup.add([rng.randrange(1000) for _ in range(prompt_len)], max_tokens, group=10_000 + group)
    computed = 0
    while not setup.is_done:
        computed += sum(setup.computed().values())
    assert computed <= most * groups * each * (prompt_len + max_tokens - 1)


def test_a_large_request_that_waits_for_blocks_lets_those_pass_that_fit_to_their_end_but_not_for_ever() -> None:
    setup = FakeEngine(blocks=20, max_running=8, max_skips=10, max_waiting=1000)
    setup.add([1] * 12, 40)
    setup.step()
    large, growing = setup.add([2] * 70, 4), setup.add([3] * 4, 70)  # 18 blocks now, 19 in the end; 16 are free
    small = setup.add([4], 1)
    setup.step()
    assert len(small.tokens) == 1 and not setup.is_running(large) and not setup.is_running(growing)
    for number in range(200):
        setup.add([number], 20)  # there is always one that would fit
        setup.step()
        if len(large.tokens):
            break
    assert len(large.tokens)


def test_a_group_whose_adapter_is_on_the_device_starves_for_places_and_holds_nobody_back() -> None:
    setup = FakeEngine(slots=1, max_running=2, max_skips=3)
    popular, rare = setup.adapter("popular"), setup.adapter("rare")
    setup.add([1], 12, rare)
    for _ in range(20):
        setup.add([1], 12, popular, group=100)  # all of them are passed over until `rare` ends
    setup.run(14)
    other, steps = setup.add([2], 1, popular), 0
    while not len(other.tokens):
        setup.step()
        steps += 1
    assert steps <= 2
