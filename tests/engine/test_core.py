"""One step of the engine: messages in, events out, and how soon the next one is wanted."""

import msgspec
import pytest

from adapters_store.parts import AdapterPackage, SourceFile
from adapters_store.ref import AdapterRef
from server.config import EngineConfig
from server.engine.core import Engine, Pace
from server.engine.fake_masks import FakeMasks
from server.engine.fake_runner import FakeChecker, FakeResidency, FakeRunner, Known, expected_tokens
from server.engine.kv_cache import KVCache
from server.engine.messages import (
    Abort,
    AdapterGone,
    AdapterMoved,
    AddAdapter,
    AddRequest,
    Configure,
    Event,
    RemoveAdapter,
    Shutdown,
    ToEngine,
    TokenEvent,
)
from server.engine.plan import Plan
from server.engine.request import FinishReason, LaneSpec, Sampling, Tier, Token
from server.engine.residency import AdapterOnDevice
from server.engine.scheduler import SchedulerLimits
from tests.support.fake_engine import FakeEngine

BLOCKS, BLOCK, VOCAB = 10, 4, 1000
REF = AdapterRef("name", "revision", "lora")
PACKAGE = AdapterPackage("lora", "revision", (), ())


class Runner(FakeRunner):
    """One that counts its steps."""

    def __init__(self) -> None:
        super().__init__(BLOCKS, BLOCK, VOCAB)
        self.num_launches = 0

    def launch(self, plan: Plan) -> Known:
        assert plan, "an empty step"
        self.num_launches += 1
        return super().launch(plan)


class Residency(FakeResidency):
    """One that remembers what it was told of."""

    def __init__(self, polls_to_load: int) -> None:
        super().__init__(2, polls_to_load)
        self.packages: dict[AdapterRef, AdapterPackage] = {}

    def register(self, ref: AdapterRef, package: AdapterPackage, pinned: bool = False) -> None:
        super().register(ref, package, pinned)
        self.packages[ref] = package


def engine(polls_to_load: int = 0, max_waiting: int = 10, max_running: int = 4) -> Engine:
    limits = SchedulerLimits(tokens_per_step=8, max_running=max_running, max_waiting=max_waiting, max_skips=5)
    return Engine(limits, KVCache(BLOCKS, BLOCK), Runner(), Residency(polls_to_load), FakeChecker(), FakeMasks())


def add(number: int, prompt: list[int], max_tokens: int = 2, adapter: AdapterRef | None = None,
        stops: frozenset[int] = frozenset(), group: int | None = None) -> AddRequest:  # fmt: skip
    lanes = [LaneSpec(prompt, adapter)]
    return AddRequest(number, number if group is None else group, lanes, max_tokens, Sampling(seed=number), stops)


def said(number: int, prompt: list[int], count: int, adapter: AdapterRef | None = None) -> list[TokenEvent]:
    """The events of a request that ends with its last token."""
    tokens = [Token(token) for token in expected_tokens(adapter, prompt, count, VOCAB)]
    return [
        *(TokenEvent(number, token) for token in tokens[:-1]),
        TokenEvent(number, tokens[-1], FinishReason.LENGTH),
    ]


def test_a_step_takes_in_what_has_come_and_says_what_came_of_it() -> None:
    it = engine()
    first, second = said(1, [5, 6], 2), said(2, [7], 1)
    assert it.step([add(1, [5, 6], 2), add(2, [7], 1)]) == [first[0], second[0]]
    assert it.step([]) == [first[1]]
    assert it.step([]) == []
    it.check()


def test_a_request_is_made_of_all_that_its_message_says() -> None:
    it = engine(max_running=1)
    it.step([add(1, [9]), AddAdapter(REF, PACKAGE), add(2, [5, 6], 3, REF, frozenset([8]), group=1)])
    request = it.scheduler.request(2)
    assert request is not None
    assert (request.id, request.group, request.max_tokens) == (2, 1, 3)
    assert request.sampling == Sampling(seed=2) and request.stop_token_ids == frozenset([8])
    assert request.first.tokens == [5, 6] and request.adapters == [REF]


def test_what_can_not_be_served_is_answered_in_the_same_step_and_before_what_was_computed() -> None:
    it = engine(max_waiting=1)
    events = it.step([add(1, [5], 1), add(2, [6], 1), Abort([1, 77])])
    assert events == [
        TokenEvent(2, None, FinishReason.ERROR, "1 requests are waiting, as many as are allowed"),
        TokenEvent(1, None, FinishReason.ABORT),
    ]
    assert it.step([add(3, [5], 1, REF), add(4, [6], 1)]) == [
        TokenEvent(3, None, FinishReason.ERROR, "the adapter 'name' is no longer served"),
        *said(4, [6], 1),
    ]


def answers(it: Engine, messages: list[ToEngine]) -> list[Event]:
    """What a step says, but for where adapters are."""
    return [event for event in it.step(messages) if not isinstance(event, AdapterMoved)]


def test_adapters_come_and_go_by_messages() -> None:
    it = engine()
    assert answers(it, [AddAdapter(REF, PACKAGE), add(1, [5], 1, REF)]) == said(1, [5], 1, REF)
    assert it._residency.packages == {REF: PACKAGE}  # type: ignore[attr-defined]
    assert it._residency.report() == (AdapterOnDevice(REF, "resident", 1000, 0),)
    assert answers(it, [RemoveAdapter(REF)]) == [AdapterGone(REF, 1000)]
    assert it._residency.report() == ()
    it.step([AddAdapter(REF, PACKAGE)])
    absent, unknown = AdapterRef("other", REF.revision, "lora"), AdapterRef("x", "unheard of", "lora")
    gone = answers(it, [RemoveAdapter(absent), RemoveAdapter(unknown)])
    assert gone == [AdapterGone(absent, 0), AdapterGone(unknown, 0)]


def test_an_adapter_is_gone_with_the_last_request_that_holds_it_and_not_if_it_comes_back_before() -> None:
    it = engine()
    it.step([AddAdapter(REF, PACKAGE), add(1, [5], 3, REF), RemoveAdapter(REF)])
    assert answers(it, [AddAdapter(REF, PACKAGE)]) == said(1, [5], 3, REF)[1:2]
    assert answers(it, []) == said(1, [5], 3, REF)[2:]  # it is served again
    it.step([add(2, [6], 3, REF)])
    it.step([RemoveAdapter(REF)])
    assert answers(it, [RemoveAdapter(REF)]) == [*said(2, [6], 3, REF)[2:], AdapterGone(REF, 1000)]  # once


def test_one_that_goes_while_it_is_loading_has_bytes_too() -> None:
    it = engine(polls_to_load=5)
    it.step([AddAdapter(REF, PACKAGE), add(1, [5], 3, REF)])
    aborted = TokenEvent(1, None, FinishReason.ABORT)
    assert answers(it, [RemoveAdapter(REF), Abort([1])]) == [aborted, AdapterGone(REF, 1000)]


def test_where_adapters_are_is_told_as_it_changes_and_not_in_every_step() -> None:
    it = engine(polls_to_load=2)

    def moved(*messages: ToEngine) -> list[AdapterMoved]:
        return [event for event in it.step(messages) if isinstance(event, AdapterMoved)]

    assert moved(AddAdapter(REF, PACKAGE), add(1, [5], 3, REF)) == [AdapterMoved(REF, Tier.LOADING, 1000)]
    assert moved() == []
    assert moved() == [AdapterMoved(REF, Tier.RESIDENT, 1000, load_s=0.0)]
    assert [moved() for _ in range(5)] == [[]] * 5
    assert moved(RemoveAdapter(REF)) == [AdapterMoved(REF, Tier.ABSENT)]


def test_the_files_of_an_adapter_lie_below_its_root() -> None:
    it = engine()
    files = (SourceFile("weights", "there/weights", 1, ""), SourceFile("other", "/elsewhere/other", 1, ""))
    it.step([AddAdapter(REF, msgspec.structs.replace(PACKAGE, files=files), root="/store")])
    paths = [file.path for file in it._residency.packages[REF].files]  # type: ignore[attr-defined]
    assert paths == ["/store/there/weights", "/elsewhere/other"]


def test_a_pinned_adapter_comes_unasked_and_the_loop_looks_after_it() -> None:
    it = engine(polls_to_load=2)
    it.step([AddAdapter(REF, PACKAGE, pinned=True)])
    assert it.pace is Pace.LOADING and it._residency.report() == (AdapterOnDevice(REF, "resident", 1000, 0),)
    it.step([])
    it.step([])
    assert it.pace is Pace.IDLE
    assert it.step([add(1, [5], 1, REF)]) == said(1, [5], 1, REF)


def test_it_goes_on_until_it_is_told_to_stop() -> None:
    it = engine()
    it.step([])
    assert it.is_shut_down is False
    it.step([Shutdown()])
    assert it.is_shut_down is True


def test_a_message_that_comes_too_late_to_matter_is_our_own_bug() -> None:
    with pytest.raises(TypeError, match="^the engine is running and takes no Configure$"):
        engine().step([Configure(EngineConfig(model_dir="."))])


def test_its_pace_says_how_soon_the_next_step_is_wanted() -> None:
    it = engine(polls_to_load=2)
    assert it.pace is Pace.BUSY  # there may be messages already
    it.step([])
    assert it.pace is Pace.IDLE
    it.step([AddAdapter(REF, PACKAGE), add(1, [5], 1, REF)])
    assert it.pace is Pace.LOADING
    it.step([add(2, [5], 1)])
    assert it.pace is Pace.BUSY
    it.step([])
    assert it.pace is Pace.BUSY  # it is here
    it.step([])
    assert it.pace is Pace.IDLE


def test_a_transfer_that_nobody_waits_for_any_more_is_looked_after_to_its_end() -> None:
    it = engine(polls_to_load=2)
    it.step([AddAdapter(REF, PACKAGE), add(1, [5], 1, REF)])
    assert it.step([Abort([1])]) == [TokenEvent(1, None, FinishReason.ABORT)]
    assert it.pace is Pace.LOADING
    it.step([])
    assert it.pace is Pace.IDLE


def test_nothing_is_launched_where_nothing_is_to_be_computed() -> None:
    it = engine()
    for messages in ([], [add(1, [5], 1)], [], []):
        it.step(messages)
    assert it._runner.num_launches == it.stats().steps == 1  # type: ignore[attr-defined]


def test_its_numbers_are_gauges_as_of_now_and_counters_since_its_start() -> None:
    it = engine(max_running=1)
    assert it.stats().kv_blocks_total == BLOCKS
    it.step([add(1, [5] * 9, 2), add(2, [5] * 9, 2), add(3, [6], 2)])
    stats = it.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used) == (1, 2, 2)
    assert (stats.steps, stats.computed_tokens, stats.prefix_queries, stats.prefix_hits) == (1, 8, 9, 0)
    it.step([])
    assert (it.stats().steps, it.stats().computed_tokens, it.stats().kv_blocks_used) == (2, 9, 3)
    for _ in range(10):
        it.step([])
    stats = it.stats()
    assert (stats.running, stats.waiting, stats.kv_blocks_used, stats.preemptions) == (0, 0, 0, 0)
    # 10 tokens of the first, 2 of the second behind 8 that the first left, 2 of the third; in 3, 2 and 2 steps
    assert (stats.steps, stats.computed_tokens, stats.prefix_queries, stats.prefix_hits) == (7, 14, 19, 8)


def test_what_a_prompt_found_in_the_prefix_cache_is_told_with_its_first_event() -> None:
    it = engine()
    prompt = [5] * 8
    for cached in (0, 4):
        events = it.step([add(1, prompt, 4)]) + it.step([]) + it.step([]) + it.step([])
        assert [event.num_cached_tokens for event in events] == [cached, 0, 0, 0]
        assert [event.token for event in events] == [event.token for event in said(1, prompt, 4)]


def test_its_check_is_the_schedulers() -> None:
    it = engine()
    it.step([add(1, [5])])
    it.check()
    it.scheduler._batch.num_lanes += 1
    with pytest.raises(AssertionError):
        it.check()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e-300])
def test_a_weight_that_turns_cannot_be_dealt_by_is_refused(weight: float) -> None:
    (event,) = engine().step([AddRequest(7, 7, [LaneSpec([1])], 1, Sampling(), frozenset(), weight)])
    assert isinstance(event, TokenEvent) and event.error is not None and "a weight from 0.001 to 1000.0" in event.error


def test_weight_and_priority_are_the_messages() -> None:
    it = engine(max_running=1)
    it.step([add(1, [5], 9)])
    it.step([AddRequest(7, 7, [LaneSpec([1])], 1, Sampling(), frozenset(), 2.5, -3)])
    request = it.scheduler.request(7)
    assert request is not None and (request.weight, request.priority) == (2.5, -3)


NO_REQUESTS = [([], 1), ([LaneSpec([])], 1), ([LaneSpec([1]), LaneSpec([])], 1), ([LaneSpec([1])], -1)]


@pytest.mark.parametrize(("lanes", "max_tokens"), NO_REQUESTS)
def test_what_is_no_request_is_refused_and_the_engine_goes_on(lanes: list[LaneSpec], max_tokens: int) -> None:
    setup = FakeEngine()
    (event,) = setup.engine.step([AddRequest(7, 7, lanes, max_tokens, Sampling(), frozenset())])
    assert event.finish is FinishReason.ERROR and "each with a prompt" in str(event.error)
    assert setup.is_done
