"""Limits on what is read, enforced while it is read."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import body_of, respond
from server.errors import InvalidRequest, PayloadTooLarge

DRAIN_BYTES = 64 << 20
DRAIN_SECONDS = 5.0


class BodyLimit:
    """Refuses a body that is longer than `max_bytes`, or compressed, before it is parsed."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity") != b"identity":
            refusal = InvalidRequest("compressed bodies are not served", param="Content-Encoding")
            await respond(415, body_of(refusal))(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_bytes:
            if b"expect" not in headers:  # a client that asks first has sent nothing yet
                await _drain(receive)
            await respond(413, body_of(self._refusal()), {"Connection": "close"})(scope, receive, send)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_bytes:
                await _drain(receive)
                raise self._refusal()
            return message

        await self._app(scope, limited, send)

    def _refusal(self) -> PayloadTooLarge:
        return PayloadTooLarge(f"the body exceeds {self._max_bytes:,} bytes")


async def _drain(receive: Receive) -> None:
    """Read and drop what the client still sends, within limits: closed too early, it would never see the answer."""
    read = 0
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while read < DRAIN_BYTES:
                message = await receive()
                read += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return
