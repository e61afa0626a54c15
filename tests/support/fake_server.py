"""A whole front on a real socket, over an engine without a model: adapters of it fail when a test says so."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from tokenizers import pre_tokenizers

from adapters_store.catalog import Catalog
from adapters_store.ref import AdapterRef
from adapters_store.rules import Rules
from adapters_store.store.store import open_store
from server import listener
from server.api.app import create_app
from server.api.service import Service
from server.api.texts.adapter_texts import AdapterTexts
from server.api.texts.text import Text
from server.config import EngineConfig, ServerConfig
from server.engine.client import EngineClient
from server.engine.core import Engine
from server.engine.fake_runner import FakeChecker, FakeResidency, FakeRunner
from server.engine.kv_cache import KVCache
from server.engine.loop import Loop
from server.engine.messages import EngineInfo
from server.engine.request import Slot
from server.engine.residency import AdapterFailed, Wait
from server.engine.scheduler import SchedulerLimits
from server.grammars.compiler import Compiler
from server.grammars.mask_maker import MaskMaker
from server.grammars.vocabulary_spec import VocabularySpec
from server.lifecycle.inspection import Inspection
from server.lifecycle.leases import Leases
from server.lifecycle.lifecycle import Lifecycle
from server.lifecycle.registry import Registry
from server.metrics import Metrics
from tests.support.adapter_files import BASE
from tests.support.adapters_alone import TERMS, InProcess
from tests.support.live_server import write_tokenizer
from tests.support.queue_link import QueueLink

BLOCKS, BLOCK, VOCAB, SLOTS = 400, 16, 256, 2
STOP = sorted(pre_tokenizers.ByteLevel.alphabet()).index("\xff")  # the token of a byte that is in no text
Result = TypeVar("Result")


class Residency(FakeResidency):
    """Adapters that are named here cannot be brought to the device, for the reason that is given."""

    def __init__(self) -> None:
        super().__init__(SLOTS, polls_to_load=1)
        self.unavailable: dict[str, str] = {}

    def acquire(self, ref: AdapterRef) -> Slot | Wait:
        if ref.name in self.unavailable:
            raise AdapterFailed(ref, self.unavailable[ref.name])
        return super().acquire(ref)


class FakeServer:
    """`in_engine` does something between two steps, `in_front` in the front's loop. `stops`: the model's stop tokens;
    where answers shall follow a grammar, there must be one (STOP)."""

    def __init__(self, root: Path, stops: frozenset[int] = frozenset(), **settings: Any) -> None:
        self.root = root
        self._vocabulary = VocabularySpec(str(root / "model"), VOCAB, tuple(stops))
        self._masks = MaskMaker(root / "model", VOCAB, tuple(stops), max_requests=16)
        self.residency = Residency()
        self._settings, self._todo = settings, deque[Callable[[], None]]()
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def in_engine(self, work: Callable[[], None]) -> None:
        done = threading.Event()
        self._todo.append(lambda: (work(), done.set())[0])  # type: ignore[func-returns-value]
        assert done.wait(10)

    def in_front(self, work: Callable[[], Result]) -> Result:
        async def done() -> Result:
            return work()

        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(10)

    def quarantine(self, name: str, reason: str) -> None:
        ref = self.in_front(lambda: self.service.catalog.find(name).ref)
        self.in_engine(lambda: self.residency.quarantine(ref, reason))

    @contextmanager
    def running(self) -> Iterator["FakeServer"]:
        self._thread.start()
        assert self._is_up.wait(20), "the server did not start"
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(20)
            assert not self._thread.is_alive()

    async def _serve(self) -> None:
        self._loop, self._stopping, link = asyncio.get_running_loop(), asyncio.Event(), QueueLink()
        registry = Registry(Catalog("tiny"), open_store(self.root / "store"), True)
        self.service = self._built(registry, link)
        client = self.service.client
        engine = threading.Thread(target=Loop(self._engine(), link, link.publish).run, args=(self._may_go_on,))
        engine.start()
        pump = asyncio.create_task(client.pump())
        config = uvicorn.Config(create_app(self.service), log_level="error", lifespan="off")
        with listener.bind("127.0.0.1", 0) as door:
            self.url = listener.url(door).removesuffix("/v1")
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve(sockets=[door]))
            while not server.started:
                await asyncio.sleep(0.01)
            self._is_up.set()
            await self._stopping.wait()
            server.should_exit = True
            await serving
        client.shut_down()
        await asyncio.to_thread(engine.join, 10)
        self._masks.stop()
        pump.cancel()
        await self.service.grammars.close()
        await self.service.lifecycle.stop()
        await registry.close()

    def _may_go_on(self) -> bool:
        while self._todo:
            self._todo.popleft()()
        return True

    def _engine(self) -> Engine:
        limits = SchedulerLimits(tokens_per_step=64, max_running=16, max_waiting=100, max_skips=20)
        runner = FakeRunner(BLOCKS, BLOCK, VOCAB, self._masks)
        return Engine(limits, KVCache(BLOCKS, BLOCK), runner, self.residency, FakeChecker(), self._masks)

    def _built(self, registry: Registry, link: QueueLink) -> Service:
        model = self.root / "model"
        model.mkdir(exist_ok=True)
        write_tokenizer(model)
        config = ServerConfig(EngineConfig(str(model)), model_name="tiny", **self._settings)
        info = EngineInfo(
            BASE, "fake", 1, "cpu", "float32", 1000, VOCAB, BLOCKS * BLOCK, 1, 1 << 20, 0,
            frozenset(self._vocabulary.stop_token_ids), 8,
            adapter_slots=SLOTS,
        )  # fmt: skip
        client, texts = EngineClient(link, registry), AdapterTexts(Text.load(model))
        metrics = Metrics(client, registry.catalog, info, config)
        verifier: Any = InProcess()
        inspection = Inspection(
            registry, Rules(BASE, (self.root,)), verifier, client, TERMS, _no_base, texts.for_template
        )
        lifecycle = Lifecycle(inspection, client, Leases(), on_delete=metrics.forget_model)
        client.on_device.follow(lifecycle.moved)
        registry.load()
        uploads: Any = type("NoUploads", (), {"limits": type("Limits", (), {"max_upload_bytes": 1})})
        fetcher: Any = None
        grammars = Compiler(self._vocabulary, config.grammar_timeout_s, config.max_grammar_bytes)
        return Service(config, info, client, lifecycle, uploads, fetcher, texts, metrics, grammars, started=0)


async def _no_base() -> str:
    return "sha256:" + "0" * 64
