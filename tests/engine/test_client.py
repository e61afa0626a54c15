"""The seam: EngineClient and the served loop with messages between them, over FakeRunner instead of a model."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from adapters_store.errors import AdapterNotFound
from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from server.engine.client import EngineClient, Submission, TokenStream
from server.engine.core import Engine
from server.engine.fake_masks import FakeMasks
from server.engine.fake_runner import FakeChecker, FakeResidency, FakeRunner, expected_tokens
from server.engine.kv_cache import KVCache
from server.engine.loop import Loop
from server.engine.messages import (
    AdapterChecked,
    AdapterGone,
    AdapterMoved,
    AddAdapter,
    AddRequest,
    CheckAdapter,
    FromFront,
    PackedAddAdapter,
    RemoveAdapter,
    Stats,
    StepDone,
    ToEngine,
    ToFront,
    TokenEvent,
)
from server.engine.request import FinishReason, LaneSpec, Sampling, Tier, Token
from server.engine.scheduler import SchedulerLimits
from server.errors import EngineDead, Overloaded
from tests.support.queue_link import QueueLink

BLOCKS, BLOCK, VOCAB = 40, 4, 1000
REF, OTHER_NAME = AdapterRef("a", "revision", "lora"), AdapterRef("b", "revision", "lora")


class Described:
    """Every adapter but those that are called `gone`."""

    def packed(self, ref: AdapterRef) -> PackedAddAdapter:
        if ref.name == "gone":
            raise AdapterNotFound(ref.name)
        package = AdapterPackage("lora", ref.revision, (), ())
        return PackedAddAdapter(ref, msgspec.Raw(msgspec.msgpack.encode(package)))


@asynccontextmanager
async def served_engine() -> AsyncIterator[EngineClient]:
    link = QueueLink()
    limits = SchedulerLimits(tokens_per_step=16, max_running=8, max_waiting=50, max_skips=20)
    residency = FakeResidency(slots=2, polls_to_load=2)
    engine = Engine(
        limits, KVCache(BLOCKS, BLOCK), FakeRunner(BLOCKS, BLOCK, VOCAB), residency, FakeChecker(), FakeMasks()
    )
    thread = threading.Thread(target=Loop(engine, link, link.publish).run, args=(lambda: True,))
    thread.start()
    client = EngineClient(link, Described())
    pump = asyncio.ensure_future(client.pump())
    try:
        yield client
    finally:
        client.shut_down()
        await asyncio.to_thread(thread.join, 10)
        pump.cancel()
        assert not thread.is_alive()


def submission(prompt: list[int], max_tokens: int, adapter: AdapterRef | None = None) -> Submission:
    return Submission(prompt, max_tokens, Sampling(), adapter, frozenset())


async def tokens(stream: TokenStream) -> list[int]:
    return [event.token.id async for event in stream if event.token is not None]


def in_engine(test: Callable[[EngineClient], Awaitable[None]]) -> Callable[[], None]:
    async def run() -> None:
        async with served_engine() as client:
            await asyncio.wait_for(test(client), 60)

    def wrapped() -> None:
        asyncio.run(run())

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__  # type: ignore[attr-defined]
    return wrapped


@in_engine
async def test_base_and_adapter_requests_get_their_own_answers(client: EngineClient) -> None:
    streams = [client.submit([submission([index], 9, ref)]) for index in range(4) for ref in (None, REF)]
    answers = await asyncio.gather(*(tokens(stream) for stream in streams))
    assert answers == [expected_tokens(ref, [index], 9, VOCAB) for index in range(4) for ref in (None, REF)]


@in_engine
async def test_one_stream_carries_several_requests(client: EngineClient) -> None:
    stream = client.submit([submission([1], 3), submission([2], 5)])
    got: dict[int, list[int | None]] = {request_id: [] for request_id in stream.request_ids}
    async for event in stream:
        got[event.request_id].append(event.token and event.token.id)
    assert list(got.values()) == [expected_tokens(None, [1], 3, VOCAB), expected_tokens(None, [2], 5, VOCAB)]
    assert client.num_requests == 0


@in_engine
async def test_cancelling_frees_the_engine(client: EngineClient) -> None:
    stream = client.submit([submission([1] * 20, 100), submission([2], 100)])
    async for _ in stream:
        break
    stream.cancel()
    stream.cancel()
    while client.stats.kv_blocks_used or client.stats.running or client.stats.waiting or not client.stats.steps:
        await asyncio.sleep(0.01)
    assert client.num_requests == 0


@in_engine
async def test_what_can_never_run_ends_with_the_reason(client: EngineClient) -> None:
    too_long = [event async for event in client.submit([submission([1] * 150, 20)])]
    assert too_long[0].finish is FinishReason.ERROR and "there are 160" in str(too_long[0].error)
    with pytest.raises(AdapterNotFound):
        client.submit([submission([1], 1), submission([1], 1, AdapterRef("gone", "x", "lora"))])
    assert client.num_requests == 0


@in_engine
async def test_a_dead_engine_ends_streams_and_refuses_work(client: EngineClient) -> None:
    stream = client.submit([submission([1], 100)])
    client.declare_dead("it was killed")
    with pytest.raises(EngineDead, match="killed"):
        await tokens(stream)
    with pytest.raises(EngineDead):
        client.submit([submission([1], 1)])
    client._death = None  # so that the fixture can end the real one


@in_engine
async def test_a_removed_adapter_gives_its_bytes_back_when_its_last_request_has_ended(client: EngineClient) -> None:
    stream = client.submit([submission([1], 150, REF)])
    async for _ in stream:
        break
    first, second = client.remove_adapter(REF), client.remove_adapter(OTHER_NAME)
    stream.cancel()
    assert await first == await second == FakeResidency.BYTES_EACH
    assert await client.remove_adapter(REF) == 0  # it is not there
    assert await tokens(client.submit([submission([1], 9, REF)])) == expected_tokens(REF, [1], 9, VOCAB)


@in_engine
async def test_a_stream_can_be_ended_with_an_error_and_the_others_go_on(client: EngineClient) -> None:
    mixed = client.submit([submission([1], 150), submission([2], 150, REF)])
    other = client.submit([submission([3], 9, AdapterRef("b", "other", "lora"))])
    mixed.end_with(Overloaded("it is deleted"))
    with pytest.raises(Overloaded, match="deleted"):
        await tokens(mixed)
    assert client.num_requests == 1
    assert len(await tokens(other)) == 9
    while client.stats.running or client.stats.waiting:
        await asyncio.sleep(0.01)


class Engineless:
    """A link to nobody: what is sent, and what a test has said to the front."""

    def __init__(self) -> None:
        self.sent: list[FromFront] = []
        self._said: asyncio.Queue[ToFront] = asyncio.Queue()

    def send(self, message: FromFront) -> None:
        self.sent.append(message)

    async def receive(self) -> ToFront:
        return await self._said.get()

    def say(self, *events: Any) -> None:
        self._said.put_nowait(StepDone(list(events), Stats()))


def alone(test: Callable[[EngineClient, Engineless], Awaitable[None]]) -> Callable[[], None]:
    async def run() -> None:
        link = Engineless()
        client = EngineClient(link, Described())
        pump = asyncio.ensure_future(client.pump())
        await asyncio.wait_for(test(client, link), 60)
        pump.cancel()

    def wrapped() -> None:
        asyncio.run(run())

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__  # type: ignore[attr-defined]
    return wrapped


@alone
async def test_a_request_is_sent_behind_its_adapters_with_its_weight_and_priority(
    client: EngineClient, link: Engineless
) -> None:
    it = Submission([1], 5, Sampling(), REF, frozenset(), weight=2.0, priority=-1, salt="mine")
    client.submit([it, it])
    introduced, *requests = link.sent
    assert isinstance(introduced, PackedAddAdapter) and introduced.ref == REF
    assert [(it.weight, it.priority) for it in requests if isinstance(it, AddRequest)] == [(2.0, -1)] * 2
    assert [it.lanes for it in requests if isinstance(it, AddRequest)] == [[LaneSpec([1], REF, "mine")]] * 2
    client.submit([it])
    assert len(link.sent) == 4  # it is known
    as_read = msgspec.msgpack.decode(msgspec.msgpack.encode(introduced), type=ToEngine)  # type: ignore[arg-type]
    assert as_read == AddAdapter(REF, AdapterPackage("lora", REF.revision, (), ()))


@alone
async def test_who_waits_for_an_adapter_to_go_hears_if_it_stays_or_the_engine_dies(
    client: EngineClient, link: Engineless
) -> None:
    client.add_adapter(REF)
    staying = client.remove_adapter(REF)
    client.submit([submission([1], 1, REF)])
    assert await staying == 0
    client.remove_adapter(REF)  # nobody waits for this one
    going, given_up = client.remove_adapter(REF), asyncio.ensure_future(wait_for(client.remove_adapter(REF)))
    await asyncio.sleep(0)
    given_up.cancel()
    assert [type(it) for it in link.sent] == [
        PackedAddAdapter,
        RemoveAdapter,
        PackedAddAdapter,
        AddRequest,
        RemoveAdapter,
    ]
    link.say(AdapterGone(OTHER_NAME, 70))
    assert await going == 70
    link.say(AdapterGone(REF, 80))  # nobody waits
    client.add_adapter(REF)
    late = client.remove_adapter(REF)
    client.declare_dead("it was killed")
    with pytest.raises(EngineDead, match="killed"):
        await late
    with pytest.raises(EngineDead):
        client.remove_adapter(REF)


async def wait_for(it: Awaitable[int]) -> int:
    return await it


@alone
async def test_a_check_is_answered_by_its_number(client: EngineClient, link: Engineless) -> None:
    checks = [asyncio.ensure_future(client.check_adapter(REF, count)) for count in (5, 6, 7)]
    await asyncio.sleep(0)
    introduced, *asked = link.sent
    assert isinstance(introduced, PackedAddAdapter) and client._is_used(REF)
    first, second, third = (it for it in asked if isinstance(it, CheckAdapter))
    assert [it.num_tokens for it in (first, second, third)] == [5, 6, 7]
    answer = AdapterChecked(second.check_id, 0.5, 9.0)
    link.say(AdapterChecked(-1, None), answer)
    assert await checks[1] == answer and not checks[0].done()
    checks[0].cancel()
    await asyncio.sleep(0)
    link.say(AdapterChecked(first.check_id, 0.5))
    client.declare_dead("it was killed")
    with pytest.raises(EngineDead):
        await checks[2]
    assert not client._is_used(REF)


@alone
async def test_where_adapters_are_is_what_the_engine_said_last(client: EngineClient, link: Engineless) -> None:
    told: list[tuple[Tier, Tier]] = []
    client.on_device.follow(lambda it: told.append((it.tier, client.on_device.of(it.ref).tier)))
    other = AdapterRef("c", "another revision", "lora")

    async def said(*events: Any) -> list[AdapterMoved]:
        link.say(*events)
        await asyncio.sleep(0.01)
        return list(client.on_device)

    assert client.on_device.of(REF) == AdapterMoved(REF, Tier.ABSENT)
    loading, resident = AdapterMoved(REF, Tier.LOADING, 70), AdapterMoved(REF, Tier.RESIDENT, 70, load_s=0.5)
    assert await said(loading, AdapterMoved(other, Tier.HOST, 0, 9)) == [loading, AdapterMoved(other, Tier.HOST, 0, 9)]
    assert (await said(resident))[0] == resident == client.on_device.of(OTHER_NAME)
    assert await said(AdapterMoved(other, Tier.ABSENT)) == [resident]
    assert await said(AdapterGone(OTHER_NAME, 70)) == [] and len(client.on_device) == 0
    tiers = [Tier.LOADING, Tier.HOST, Tier.RESIDENT, Tier.ABSENT]
    assert told == list(zip(tiers, tiers, strict=True))


@alone
async def test_telling_the_engine_of_an_adapter_again_lifts_its_quarantine(
    client: EngineClient, link: Engineless
) -> None:
    client.submit([submission([1], 1, REF)])
    link.say(AdapterMoved(REF, Tier.QUARANTINED, reason="why"))
    await asyncio.sleep(0.01)
    client.submit([submission([1], 1, REF)])
    assert client.on_device.of(REF).tier is Tier.QUARANTINED
    client.add_adapter(OTHER_NAME)
    assert client.on_device.of(REF).tier is Tier.ABSENT
    assert [type(it) for it in link.sent] == [PackedAddAdapter, AddRequest, AddRequest, PackedAddAdapter]


@in_engine
async def test_the_real_engine_tells_where_adapters_are(client: EngineClient) -> None:
    await tokens(client.submit([submission([1], 3, REF)]))
    assert client.on_device.of(REF).tier is Tier.RESIDENT
    assert sum(it.bytes for it in client.on_device) == FakeResidency.BYTES_EACH
    await client.remove_adapter(REF)
    assert len(client.on_device) == 0


@alone
async def test_what_requests_ask_for_is_counted_by_weights_and_named_by_name(
    client: EngineClient, link: Engineless
) -> None:
    stream = client.submit([submission([1], 1, REF), submission([1], 1, OTHER_NAME), submission([1], 1, REF)])
    client.submit([submission([1], 1)])
    assert client.num_requests_of(REF) == client.num_requests_of(OTHER_NAME) == 3
    assert [it.name for it in client.adapters_asked_for()] == ["a", "b"]
    stream.cancel()
    assert client.num_requests_of(REF) == 0 and client.adapters_asked_for() == []


@alone
async def test_a_token_has_the_time_at_which_it_came_however_late_it_is_read(
    client: EngineClient, link: Engineless
) -> None:
    stream, now = client.submit([submission([1], 2)]), asyncio.get_running_loop().time
    [number] = stream.request_ids
    said = list[tuple[float, float]]()
    for event in (TokenEvent(number, Token(5)), TokenEvent(number, Token(6), FinishReason.LENGTH)):
        begin = now()
        link.say(event)
        await asyncio.sleep(0.1)
        said.append((begin, now()))
    came = [stream.heard_at async for _ in stream]
    assert all(begin <= at <= end for at, (begin, end) in zip(came, said, strict=True))
