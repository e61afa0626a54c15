"""The seam: EngineClient and the served loop with messages between them, over FakeRunner instead of a model."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest

from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from server.engine.client import EngineClient, Submission, TokenStream
from server.engine.core import Engine
from server.engine.fake_runner import FakeResidency, FakeRunner, expected_tokens
from server.engine.kv_cache import KVCache
from server.engine.loop import Loop
from server.engine.messages import ToEngine, ToFront
from server.engine.request import FinishReason, Sampling
from server.engine.scheduler import SchedulerLimits
from server.errors import EngineDead

BLOCKS, BLOCK, VOCAB = 40, 4, 1000
REF = AdapterRef("a", "revision", "lora")


class QueueLink:
    """Both ends of the link in one process; every message goes through the codec as it would between two."""

    def __init__(self) -> None:
        self._to_engine: queue.Queue[bytes] = queue.Queue()
        self._to_front: asyncio.Queue[bytes] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def send(self, message: ToEngine) -> None:
        self._to_engine.put(msgspec.msgpack.encode(message))

    async def receive(self) -> ToFront:
        return msgspec.msgpack.decode(await self._to_front.get(), type=ToFront)  # type: ignore[arg-type]

    def publish(self, message: ToFront) -> None:
        self._loop.call_soon_threadsafe(self._to_front.put_nowait, msgspec.msgpack.encode(message))

    def receive_all(self, timeout_ms: int) -> list[ToEngine]:
        frames: list[bytes] = []
        try:
            frames.append(self._to_engine.get(timeout=max(timeout_ms, 1) / 1000))
            while True:
                frames.append(self._to_engine.get_nowait())
        except queue.Empty:
            return [msgspec.msgpack.decode(frame, type=ToEngine) for frame in frames]  # type: ignore[arg-type]


@asynccontextmanager
async def served_engine() -> AsyncIterator[EngineClient]:
    link = QueueLink()
    limits = SchedulerLimits(tokens_per_step=16, max_running=8, max_waiting=50, max_skips=20)
    residency = FakeResidency(slots=2, polls_to_load=2)
    engine = Engine(limits, KVCache(BLOCKS, BLOCK), FakeRunner(BLOCKS, BLOCK, VOCAB), residency)
    thread = threading.Thread(target=Loop(engine, link, link.publish).run, args=(lambda: True,))
    thread.start()
    client = EngineClient(link)
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
            await asyncio.wait_for(test(client), 20)

    def wrapped() -> None:
        asyncio.run(run())

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__  # type: ignore[attr-defined]
    return wrapped


@in_engine
async def test_base_and_adapter_requests_get_their_own_answers(client: EngineClient) -> None:
    client.add_adapter(REF, AdapterPackage("lora", "", REF.revision, (), ()))
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
    unknown = [event async for event in client.submit([submission([1], 1, REF)])]
    assert "no longer served" in str(unknown[0].error)


@in_engine
async def test_a_dead_engine_ends_streams_and_refuses_work(client: EngineClient) -> None:
    stream = client.submit([submission([1], 100)])
    client.declare_dead("it was killed")
    with pytest.raises(EngineDead, match="killed"):
        await tokens(stream)
    with pytest.raises(EngineDead):
        client.submit([submission([1], 1)])
    client._death = None  # so that the fixture can end the real one
