"""The front's view of the engine: submit a request, iterate over its tokens, cancel it.

Needs any link whose other end speaks messages.py: the engine process, or an EngineCore over FakeRunner in a thread.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from server.engine.messages import (
    Abort,
    AddAdapter,
    AddRequest,
    EngineInfo,
    Progress,
    Ready,
    RemoveAdapter,
    Shutdown,
    StartFailed,
    Stats,
    StepDone,
    ToEngine,
    ToFront,
    TokenEvent,
)
from server.engine.request import Sampling
from server.errors import EngineDead, StartupError


class Link(Protocol):
    async def send(self, message: ToEngine) -> None: ...

    async def receive(self) -> ToFront: ...


class TokenStream:
    """The tokens of one request. Iterate to its end, or `cancel()`; leaving early without either leaks work.

    The buffer is bounded by the request's own max_tokens.
    """

    def __init__(self, request_id: int, client: "EngineClient") -> None:
        self.request_id = request_id
        self._client = client
        self._events: asyncio.Queue[TokenEvent | EngineDead] = asyncio.Queue()
        self.is_over = False

    def put(self, event: TokenEvent | EngineDead) -> None:
        self._events.put_nowait(event)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while not self.is_over:
            event = await self._events.get()
            if isinstance(event, EngineDead):
                self.is_over = True
                raise event
            self.is_over = event.finish is not None
            yield event

    async def cancel(self) -> None:
        """Stop the request if it still runs. Safe at any time, any number of times."""
        if not self.is_over:
            self.is_over = True
            await self._client.abort(self.request_id)


class EngineClient:
    def __init__(self, link: Link) -> None:
        self._link = link
        self._streams: dict[int, TokenStream] = {}
        self._next_id = 0
        self._death: str | None = None
        self.stats = Stats()
        self.last_heard = time.monotonic()

    # -- life of the engine ---------------------------------------------------------------------------------------

    async def wait_ready(self, on_progress: Callable[[Progress], None]) -> EngineInfo:
        """Follow the engine's start. Raises StartupError with its reason."""
        while True:
            match await self._link.receive():
                case Progress() as progress:
                    on_progress(progress)
                case Ready(info=info):
                    self.last_heard = time.monotonic()
                    return info
                case StartFailed(message=message):
                    raise StartupError(message)

    async def pump(self) -> None:
        """Deliver what the engine sends, for ever. Run as one task."""
        while True:
            message = await self._link.receive()
            self.last_heard = time.monotonic()
            if isinstance(message, StepDone):
                self.stats = message.stats
                for event in message.events:
                    self._deliver(event)

    def _deliver(self, event: TokenEvent) -> None:
        stream = self._streams.get(event.request_id)
        if stream is not None:
            if event.finish is not None:
                del self._streams[event.request_id]
            stream.put(event)

    def declare_dead(self, reason: str) -> None:
        """The engine is gone: every open stream ends with EngineDead, every later call raises it."""
        self._death = reason
        for stream in self._streams.values():
            stream.put(EngineDead(reason))
        self._streams.clear()

    @property
    def death(self) -> str | None:
        return self._death

    @property
    def num_streams(self) -> int:
        return len(self._streams)

    @property
    def silence_s(self) -> float:
        """Seconds since the engine was last heard."""
        return time.monotonic() - self.last_heard

    async def shut_down(self) -> None:
        if self._death is None:
            await self._link.send(Shutdown())

    # -- requests -------------------------------------------------------------------------------------------------

    async def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: Sampling,
        adapter: AdapterRef | None,
        stop_token_ids: frozenset[int],
    ) -> TokenStream:
        self._require_alive()
        self._next_id += 1
        stream = TokenStream(self._next_id, self)
        self._streams[stream.request_id] = stream
        await self._link.send(AddRequest(stream.request_id, prompt, max_tokens, sampling, adapter, stop_token_ids))
        return stream

    async def abort(self, request_id: int) -> None:
        if self._streams.pop(request_id, None) is not None and self._death is None:
            await self._link.send(Abort([request_id]))

    # -- adapters -------------------------------------------------------------------------------------------------

    async def add_adapter(self, ref: AdapterRef, package: AdapterPackage) -> None:
        self._require_alive()
        await self._link.send(AddAdapter(ref, package))

    async def remove_adapter(self, ref: AdapterRef) -> None:
        self._require_alive()
        await self._link.send(RemoveAdapter(ref))

    def _require_alive(self) -> None:
        if self._death is not None:
            raise EngineDead(self._death)
