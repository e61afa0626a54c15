"""Limits on a request's head and body, enforced while they are read."""

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.transport.errors import body_of, refuse
from server.api.transport.file_bodies import FORM_BYTES, carries_files
from server.errors import HeddleError, InvalidRequest, Overloaded, PayloadTooLarge, TooManyHeaders, UnsupportedEncoding

DRAIN_BYTES = 64 << 20
DRAIN_SECONDS = 5.0
MAX_HEADERS = 100
MAX_HELD_BYTES = 512 << 20  # of the bodies of all requests, until they are answered


class RequestLimits:
    """Refuses a head that can be read in two ways or is too long, and a body that is longer than `max_bytes` or
    compressed, before it is parsed. A body of files may have `max_file_bytes`, and is not held: it goes to disk."""

    def __init__(self, app: ASGIApp, max_bytes: int, max_file_bytes: int = 0) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_file_bytes = max_file_bytes
        self._held_bytes = 0  # of all requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_held = not self._max_file_bytes or not carries_files(scope["method"], scope["path"], scope["headers"])
        max_bytes = self._max_bytes if is_held else self._max_file_bytes + FORM_BYTES
        refusal = _refusal_of_head(scope, max_bytes)
        if refusal is not None:
            if b"expect" not in dict(scope["headers"]):  # a client that asks first has sent nothing yet
                await _drain(receive)
            await refuse(scope, refusal.status, body_of(refusal), {"Connection": "close"})(scope, receive, send)
            return
        read = held = 0

        async def limited() -> Message:
            nonlocal read, held
            message = await receive()
            count = len(message.get("body", b""))
            read += count
            if is_held:
                held += count
                self._held_bytes += count
            if read > max_bytes:
                await _drain(receive)
                raise _too_large(max_bytes)
            if self._held_bytes > MAX_HELD_BYTES:
                raise Overloaded(f"the bodies of requests under way have {MAX_HELD_BYTES:,} bytes; no more are taken")
            return message

        try:
            await self._app(scope, limited, send)
        finally:
            self._held_bytes -= held


def _refusal_of_head(scope: Scope, max_bytes: int) -> HeddleError | None:
    headers = dict(scope["headers"])
    if len(scope["headers"]) > MAX_HEADERS:
        return TooManyHeaders(f"{len(scope['headers']):,} headers; at most {MAX_HEADERS} are read")
    if b"content-length" in headers and b"transfer-encoding" in headers:
        # two servers in a row may believe different ones, and find different requests in the same bytes
        return InvalidRequest("Content-Length beside Transfer-Encoding", code="invalid_http")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        return UnsupportedEncoding("compressed bodies are not served", param="Content-Encoding")
    length = headers.get(b"content-length", b"0")
    return None if length.isdigit() and int(length) <= max_bytes else _too_large(max_bytes)


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body exceeds {max_bytes:,} bytes")


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
