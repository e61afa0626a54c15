"""Server-sent events, and answers whose client may leave."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from fastapi.responses import StreamingResponse

from server.api.errors import body_of, internal_error
from server.errors import ClientLeft, HeddleError

DONE = b"data: [DONE]\n\n"
Result = TypeVar("Result")


async def event_stream(request: Request, bodies: AsyncGenerator[Mapping[str, object]]) -> StreamingResponse:
    """Stream `bodies` as events, then [DONE]. Raises ClientLeft if the client leaves before the first.

    The first is awaited before the answer begins, so that a request which fails at once gets its status code. One that
    fails later ends with an error event and without [DONE].
    """

    async def begin() -> Mapping[str, object]:
        return await anext(bodies)

    first = await unless_client_leaves(request, begin())

    async def events() -> AsyncIterator[bytes]:
        try:
            yield _event(first)
            async for body in bodies:
                yield _event(body)
            yield DONE
        except HeddleError as error:
            yield _event(body_of(error))
        except Exception as error:  # ours to mend; without an event the client would take the stream for whole
            yield _event(internal_error(request, error))
        finally:
            await bodies.aclose()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events(), media_type="text/event-stream", headers=headers)


def _event(body: Mapping[str, object]) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


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
