"""Server-sent events, and answers whose client may leave."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import StreamingResponse

from server.api.transport.errors import body_of, internal_error
from server.errors import ClientLeft, HeddleError

_COMMENT = b": keep-alive\n\n"  # which clients pass over
# An event's lines end with CR or LF alone, but many readers (Python's str.splitlines, httpx's iter_lines) also end one
# at these, which a model may well write. As JSON escapes they mean the same to every reader.
_LINE_ENDS = {end.encode(): f"\\u{ord(end):04x}".encode() for end in "\x85\u2028\u2029"}
Result = TypeVar("Result")


def data(body: Mapping[str, object]) -> bytes:
    encoded = msgspec.json.encode(body)
    for end, escape in _LINE_ENDS.items():
        encoded = encoded.replace(end, escape)
    return b"data: " + encoded + b"\n\n"


def named(name: str, body: Mapping[str, object]) -> bytes:
    return b"event: " + name.encode() + b"\n" + data(body)


@dataclass(frozen=True)
class Ending:
    """How a stream ends: `done` where all went well, `failed` of OpenAI's error body where it did not."""

    done: bytes
    failed: Callable[[Mapping[str, object]], bytes]


OPENAI = Ending(b"data: [DONE]\n\n", data)


async def event_stream(request: Request, events: AsyncGenerator[bytes | None], ending: Ending) -> StreamingResponse:
    """Stream `events`, and a comment for each None. Raises ClientLeft if the client leaves before the first.

    The first is awaited before the answer begins, so that a request which fails at once gets its status code. One that
    fails later ends with an error event, and not as one that is whole.
    """

    async def begin() -> bytes | None:
        return await anext(events)

    first = await unless_client_leaves(request, begin())

    async def sent() -> AsyncIterator[bytes]:
        try:
            yield first or _COMMENT
            async for event in events:
                yield event or _COMMENT
            if ending.done:
                yield ending.done
        except HeddleError as error:
            yield ending.failed(body_of(error))
        except Exception as error:  # ours to mend; without an event the client would take the stream for whole
            yield ending.failed(internal_error(request, error))
        finally:
            await events.aclose()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(sent(), media_type="text/event-stream", headers=headers)


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled if the client disconnects first. Raises ClientLeft then."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
