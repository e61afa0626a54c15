"""The front's view of the engine: submit requests, iterate over their tokens, cancel them.

Needs any link whose other end speaks messages.py: the engine process, or a Loop over FakeRunner in a thread.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from adapters_store.ref import AdapterRef
from server.engine.awaited import Awaited
from server.engine.introductions import Introductions, Packages
from server.engine.messages import (
    Abort,
    AdapterChecked,
    AdapterGone,
    AdapterMoved,
    AddRequest,
    CheckAdapter,
    EngineInfo,
    Event,
    FromFront,
    PackedAddAdapter,
    Progress,
    Ready,
    RemoveAdapter,
    Shutdown,
    StartFailed,
    Stats,
    StepDone,
    ToFront,
    TokenEvent,
)
from server.engine.on_device import OnDevice
from server.engine.open_requests import OpenRequests
from server.engine.request import LaneSpec, OfPrompt, Sampling, Tier
from server.errors import ConfigError, EngineDead, HeddleError, StartupError


class Link(Protocol):
    def send(self, message: FromFront) -> None: ...

    async def receive(self) -> ToFront: ...


@dataclass(frozen=True)
class Submission:
    """A request, before the engine has given it a number."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    adapter: AdapterRef | None
    stop_token_ids: frozenset[int]
    weight: float = 1.0
    priority: int = 0
    salt: str = ""
    of_prompt: OfPrompt | None = None
    grammar: str | None = None


class TokenStream:
    """The tokens of some requests, as they come. Iterate to the end or `cancel()`: leaving otherwise leaks work.

    The buffer is bounded by the requests' own max_tokens.
    """

    def __init__(self, request_ids: Sequence[int], client: "EngineClient") -> None:
        self.request_ids = tuple(request_ids)
        self._open = set(request_ids)
        self._client = client
        self._events: asyncio.Queue[tuple[TokenEvent | HeddleError | None, float]] = asyncio.Queue()
        self._has_heard = True  # since it was last marked as silent
        self.heard_at = 0.0  # when the event came that was yielded last, however late it is read

    def put(self, event: TokenEvent | HeddleError, at: float) -> None:
        """at: seconds of the monotonic clock."""
        self._has_heard = True
        self._events.put_nowait((event, at))

    def mark_silence(self) -> None:
        """Let who iterates get None if nothing has come since the last call."""
        if not self._has_heard:
            self._events.put_nowait((None, 0.0))
        self._has_heard = False

    async def __aiter__(self) -> AsyncIterator[TokenEvent | None]:
        """Tokens, and None where nothing comes for long."""
        while self._open:
            event, at = await self._events.get()
            if isinstance(event, HeddleError):
                self._open.clear()
                raise event
            if event is None:
                yield None
            elif event.request_id in self._open:  # else it was stopped meanwhile
                if event.finish is not None:
                    self._open.remove(event.request_id)
                self.heard_at = at
                yield event

    def stop(self, request_id: int) -> None:
        """End one request early; no more of its tokens come out."""
        if request_id in self._open:
            self._open.remove(request_id)
            self._client.abort([request_id])

    def end_with(self, error: HeddleError) -> None:
        """End whatever still runs; who iterates gets the error."""
        if self._open:
            self._client.abort(sorted(self._open))
            self.put(error, time.monotonic())

    def cancel(self) -> None:
        """End whatever still runs. Safe at any time, any number of times."""
        self._client.abort(sorted(self._open))
        self._open.clear()


class EngineClient:
    def __init__(self, link: Link, packages: Packages) -> None:
        self._link = link
        self._requests: OpenRequests[TokenStream] = OpenRequests()
        self._removals: Awaited[AdapterRef, int] = Awaited()
        self._checks: Awaited[int, AdapterChecked] = Awaited()
        self._checked: dict[int, AdapterRef] = {}  # by check, until it is answered
        self._introductions = Introductions(packages, self._tell, self._is_used)
        self._next_id = 0
        self._death: str | None = None
        self.stats = Stats()
        self.on_device = OnDevice()
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

    async def mark_silence(self, interval_s: float) -> None:
        """Mark it in every stream to which nothing has come for so long, or up to twice as long, for ever. Run as one
        task: a timer for each token would cost more than the token."""
        while True:
            await asyncio.sleep(interval_s)
            for stream in self._requests.streams():
                stream.mark_silence()

    async def pump(self) -> None:
        """Deliver what the engine sends, for ever. Run as one task."""
        while True:
            self.hear(await self._link.receive())

    def hear(self, message: ToFront) -> None:
        """Deliver what has come."""
        self.last_heard = time.monotonic()
        if isinstance(message, StepDone):
            self.stats = message.stats
            for event in message.events:
                self._deliver(event)

    def _deliver(self, event: Event) -> None:
        match event:
            case TokenEvent():
                stream = self._requests.stream(event.request_id)
                if stream is not None:
                    if event.finish is not None:
                        self._requests.end(event.request_id)
                    stream.put(event, self.last_heard)
            case AdapterGone(ref=ref, num_bytes=num_bytes):
                self.on_device.forget(ref)
                self._removals.resolve(ref, num_bytes)
            case AdapterChecked(check_id=check_id):
                self._checks.resolve(check_id, event)
            case AdapterMoved():
                self.on_device.take(event)

    def declare_dead(self, reason: str) -> None:
        """The engine is gone: every open stream and whatever else is awaited ends with EngineDead, every later call
        raises it."""
        self._death = reason
        self.end_streams(EngineDead(reason))
        self._removals.fail(EngineDead(reason))
        self._checks.fail(EngineDead(reason))

    def end_streams(self, error: HeddleError) -> None:
        """End every open stream with this error; the engine goes on with nothing to do."""
        for stream in self._requests.streams():
            stream.end_with(error)

    @property
    def death(self) -> str | None:
        return self._death

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    def num_requests_of(self, ref: AdapterRef) -> int:
        """Those that have not ended and go through these weights, by whatever name."""
        return self._requests.num_of(ref)

    def adapters_asked_for(self) -> list[AdapterRef]:
        """By requests that have not ended, once by each name."""
        return self._requests.adapters()

    @property
    def silence_s(self) -> float:
        """Seconds since the engine was last heard."""
        return time.monotonic() - self.last_heard

    def shut_down(self) -> None:
        if self._death is None:
            self._link.send(Shutdown())

    # -- requests -----------------------------------------------------------

    def submit(self, submissions: Sequence[Submission]) -> TokenStream:
        """Start the requests of one HTTP request; request_ids of the stream are in the same order. Raises EngineDead,
        and AdapterError if an adapter is not there any more."""
        self.require_alive()
        self._introductions.introduce(it.adapter for it in submissions if it.adapter is not None)
        first = self._next_id
        self._next_id += len(submissions)
        stream = TokenStream(range(first, self._next_id), self)
        for request_id, submission in zip(stream.request_ids, submissions, strict=True):
            self._requests.add(request_id, stream, submission.adapter)
            self._link.send(
                AddRequest(
                    request_id,
                    first,
                    [LaneSpec(submission.prompt, submission.adapter, submission.salt)],
                    submission.max_tokens,
                    submission.sampling,
                    submission.stop_token_ids,
                    weight=submission.weight,
                    priority=submission.priority,
                    of_prompt=submission.of_prompt,
                    grammar=submission.grammar,
                )
            )
        return stream

    def abort(self, request_ids: Sequence[int]) -> None:
        known = [request_id for request_id in request_ids if self._requests.end(request_id)]
        if known and self._death is None:
            self._link.send(Abort(known))

    # -- adapters -----------------------------------------------------------

    def add_adapter(self, ref: AdapterRef) -> None:
        """Tell the engine of it now, as it is described now: it is pinned or no longer, or its files have moved. One
        that is only to be used is introduced by its first request. Raises AdapterError if it is not described."""
        self.require_alive()
        self._introductions.again(ref)

    def remove_adapter(self, ref: AdapterRef) -> Awaitable[int]:
        """No request may use it from now on. Once the last that does has ended: the bytes of the device that this gave
        back, 0 if it was not there or is told of again before. Nobody need await it. Raises EngineDead; so does what
        is awaited."""
        self.require_alive()
        is_known, is_leaving = ref in self._introductions, ref in self._removals
        gone = self._removals.wait(ref)
        if is_known:
            self._introductions.forget(ref)
            self._link.send(RemoveAdapter(ref))
        elif not is_leaving:
            self._removals.resolve(ref, 0)
        return gone

    def is_given_up(self, ref: AdapterRef) -> bool:
        """It is in quarantine in the engine, which has not been told of it again since: `add_adapter` lifts that."""
        return self.on_device.of(ref).tier is Tier.QUARANTINED

    async def check_adapter(self, ref: AdapterRef, num_tokens: int) -> AdapterChecked:
        """See CheckAdapter. Raises EngineDead, and AdapterError if the adapter is not there any more."""
        self.require_alive()
        self._introductions.introduce([ref])
        check_id = self._next_id
        self._next_id += 1
        answer = self._checks.wait(check_id)
        self._link.send(CheckAdapter(check_id, ref, num_tokens))
        self._checked[check_id] = ref
        try:
            return await answer
        finally:
            del self._checked[check_id]

    def _is_used(self, ref: AdapterRef) -> bool:
        return self._requests.num_of(ref) > 0 or ref in self._checked.values()

    def _tell(self, message: PackedAddAdapter | RemoveAdapter) -> None:
        if isinstance(message, PackedAddAdapter):
            # what was being removed may stay; then the engine says nothing of it
            self._removals.resolve(message.ref, 0)
            if self.is_given_up(message.ref):
                self.on_device.forget(message.ref)  # this lifts it, and where it is then will be told
        self._link.send(message)

    def require_alive(self) -> None:
        """Raises EngineDead."""
        if self._death is not None:
            raise EngineDead(self._death)
