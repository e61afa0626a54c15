"""The front's view of the engine: submit requests, iterate over their tokens, cancel them.

Needs any link whose other end speaks messages.py: the engine process, or a Loop over FakeRunner in a thread.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
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
from server.engine.request import LaneSpec, Sampling
from server.errors import ConfigError, EngineDead, HeddleError, StartupError


class Link(Protocol):
    def send(self, message: ToEngine) -> None: ...

    async def receive(self) -> ToFront: ...


@dataclass(frozen=True)
class Submission:
    """A request, before the engine has given it a number."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    adapter: AdapterRef | None
    stop_token_ids: frozenset[int]


class TokenStream:
    """The tokens of some requests, as they come. Iterate to the end or `cancel()`: leaving otherwise leaks work.

    The buffer is bounded by the requests' own max_tokens.
    """

    def __init__(self, request_ids: Sequence[int], client: "EngineClient") -> None:
        self.request_ids = tuple(request_ids)
        self._open = set(request_ids)
        self._client = client
        self._events: asyncio.Queue[TokenEvent | HeddleError] = asyncio.Queue()

    def put(self, event: TokenEvent | HeddleError) -> None:
        self._events.put_nowait(event)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        while self._open:
            event = await self._events.get()
            if isinstance(event, HeddleError):
                self._open.clear()
                raise event
            if event.request_id in self._open:  # else it was stopped meanwhile
                if event.finish is not None:
                    self._open.remove(event.request_id)
                yield event

    def stop(self, request_id: int) -> None:
        """End one request early; no more of its tokens come out."""
        if request_id in self._open:
            self._open.remove(request_id)
            self._client.abort([request_id])

    def cancel(self) -> None:
        """End whatever still runs. Safe at any time, any number of times."""
        self._client.abort(sorted(self._open))
        self._open.clear()


class EngineClient:
    def __init__(self, link: Link) -> None:
        self._link = link
        self._streams: dict[int, TokenStream] = {}
        self._next_id = 0
        self._death: str | None = None
        self.stats = Stats()
        self.last_heard = time.monotonic()

    # -- life of the engine -----------------------------------------------------------

    async def wait_ready(self, on_progress: Callable[[Progress], None]) -> EngineInfo:
        """Follow the engine's start. Raises ConfigError or StartupError with its reason."""
        while True:
            match await self._link.receive():
                case Progress() as progress:
                    on_progress(progress)
                case Ready(info=info):
                    self.last_heard = time.monotonic()
                    return info
                case StartFailed(message=message, is_final=is_final):
                    raise ConfigError(message) if is_final else StartupError(message)

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
        self.end_streams(EngineDead(reason))

    def end_streams(self, error: HeddleError) -> None:
        """End every open stream with this error; the engine goes on with nothing to do."""
        streams = set(self._streams.values())
        self.abort(list(self._streams))
        for stream in streams:
            stream.put(error)

    @property
    def death(self) -> str | None:
        return self._death

    @property
    def num_requests(self) -> int:
        return len(self._streams)

    @property
    def silence_s(self) -> float:
        """Seconds since the engine was last heard."""
        return time.monotonic() - self.last_heard

    def shut_down(self) -> None:
        if self._death is None:
            self._link.send(Shutdown())

    # -- requests -----------------------------------------------------------

    def submit(self, submissions: Sequence[Submission]) -> TokenStream:
        """Start the requests of one HTTP request; request_ids of the stream are in the same order."""
        self.require_alive()
        first = self._next_id
        self._next_id += len(submissions)
        stream = TokenStream(range(first, self._next_id), self)
        for request_id, submission in zip(stream.request_ids, submissions, strict=True):
            self._streams[request_id] = stream
            self._link.send(
                AddRequest(
                    request_id,
                    first,
                    [LaneSpec(submission.prompt, submission.adapter)],
                    submission.max_tokens,
                    submission.sampling,
                    submission.stop_token_ids,
                )
            )
        return stream

    def abort(self, request_ids: Sequence[int]) -> None:
        known = [request_id for request_id in request_ids if self._streams.pop(request_id, None) is not None]
        if known and self._death is None:
            self._link.send(Abort(known))

    # -- adapters -----------------------------------------------------------

    def add_adapter(self, ref: AdapterRef, package: AdapterPackage) -> None:
        self.require_alive()
        self._link.send(AddAdapter(ref, package))

    def remove_adapter(self, ref: AdapterRef) -> None:
        self.require_alive()
        self._link.send(RemoveAdapter(ref))

    def require_alive(self) -> None:
        """Raises EngineDead."""
        if self._death is not None:
            raise EngineDead(self._death)
