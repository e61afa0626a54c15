"""Limits on heads and bodies, tried on the middleware itself: at each limit all is well, one beyond it is refused."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from server.api.transport import limits
from server.api.transport.limits import MAX_HEADERS, RequestLimits
from server.errors import HeddleError, Overloaded, PayloadTooLarge
from tests.support.waiting import soon

MOST = 1000  # bytes of a body
Headers = list[tuple[bytes, bytes]]


class Application:
    """Reads the body to its end; notes what it got, or the error that came instead."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.errors: list[HeddleError] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        try:
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
        except HeddleError as error:
            self.errors.append(error)
            return
        self.bodies.append(body)
        await self.may_answer.wait()


class Sent:
    """A request's body in pieces; counts those that were read."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = pieces
        self.num_read = 0

    async def receive(self) -> Message:
        self.num_read += 1
        if self.num_read > len(self._pieces):
            await asyncio.Event().wait()  # a client that says no more
        more = self.num_read < len(self._pieces)
        return {"type": "http.request", "body": self._pieces[self.num_read - 1], "more_body": more}


async def ask(middleware: RequestLimits, headers: Headers, sent: Sent) -> tuple[int, dict[str, Any]] | None:
    """Status and error of the middleware's own answer; None if it let the application answer."""
    answer: list[Message] = []

    async def send(message: Message) -> None:
        answer.append(message)

    await middleware({"type": "http", "headers": headers}, sent.receive, send)
    if not answer:
        return None
    assert (b"connection", b"close") in answer[0]["headers"]
    return answer[0]["status"], json.loads(answer[1]["body"])["error"]


def run(test: Callable[[Application, RequestLimits], Awaitable[None]]) -> None:
    async def limited() -> None:
        application = Application()
        async with asyncio.timeout(10):
            await test(application, RequestLimits(application, MOST))

    asyncio.run(limited())


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [
        ([(b"a", b"b")] * MAX_HEADERS, None, ""),
        ([(b"a", b"b")] * (MAX_HEADERS + 1), 431, "101 headers; at most 100 are read"),
        ([(b"content-length", b"1000")], None, ""),
        ([(b"content-length", b"1001")], 413, "the body exceeds 1,000 bytes"),
        ([(b"content-length", b"-1")], 413, "the body exceeds"),
        ([(b"content-length", b"1e1")], 413, "the body exceeds"),
        ([(b"content-length", b"")], 413, "the body exceeds"),
        ([(b"transfer-encoding", b"chunked")], None, ""),
        ([(b"content-length", b"1"), (b"transfer-encoding", b"chunked")], 400, "beside Transfer-Encoding"),
        ([(b"content-encoding", b"Identity")], None, ""),
        ([(b"content-encoding", b"gzip")], 415, "compressed bodies are not served"),
    ],
)
def test_a_head_is_refused_before_the_application_hears_of_it(headers: Headers, status: int | None, says: str) -> None:
    async def test(application: Application, middleware: RequestLimits) -> None:
        sent = Sent(b"x" * 600, b"x" * 400)
        answer = await ask(middleware, headers, sent)
        assert sent.num_read == 2  # also of what is refused: closed too early, its client would not see why
        if status is None:
            assert answer is None and application.bodies == [b"x" * 1000]
        else:
            assert answer is not None and answer[0] == status and says in answer[1]["message"]
            assert application.bodies == [] == application.errors

    run(test)


def test_a_client_that_asks_first_is_answered_at_once() -> None:
    async def test(application: Application, middleware: RequestLimits) -> None:
        sent = Sent(b"x")
        answer = await ask(middleware, [(b"expect", b"100-continue"), (b"content-length", b"2000")], sent)
        assert answer is not None and answer[0] == 413 and sent.num_read == 0

    run(test)


def test_a_body_may_be_as_long_as_the_limit_and_no_longer() -> None:
    async def test(application: Application, middleware: RequestLimits) -> None:
        await ask(middleware, [], Sent(b"x" * 999, b"x"))
        assert application.bodies == [b"x" * 1000]
        sent = Sent(b"x" * 999, b"x", b"x", b"x" * 5)
        await ask(middleware, [], sent)
        assert [type(it) for it in application.errors] == [PayloadTooLarge] and len(application.bodies) == 1
        assert "exceeds 1,000 bytes" in application.errors[0].message and sent.num_read == 4

    run(test)


def test_bodies_are_held_within_one_limit_until_they_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_HELD_BYTES", 1500)

    async def test(application: Application, middleware: RequestLimits) -> None:
        application.may_answer.clear()
        first = asyncio.create_task(ask(middleware, [], Sent(b"x" * 1000)))
        await soon(lambda: len(application.bodies) == 1)
        await ask(middleware, [], Sent(b"y" * 300, b"y" * 300))  # the second piece is too much
        assert [type(it) for it in application.errors] == [Overloaded]
        assert "have 1,500 bytes" in application.errors[0].message
        second = asyncio.create_task(ask(middleware, [], Sent(b"y" * 500)))
        await soon(lambda: len(application.bodies) == 2)
        assert [len(body) for body in application.bodies] == [1000, 500]
        application.may_answer.set()
        await asyncio.gather(first, second)
        application.bodies.clear()
        for _ in range(3):  # all was given back, also by the one that was refused
            await asyncio.gather(*(ask(middleware, [], Sent(b"z" * 750)) for _ in range(2)))
        assert len(application.bodies) == 6 and len(application.errors) == 1

    run(test)


def test_what_is_dropped_is_limited_in_bytes_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DRAIN_BYTES", 5000)
    monkeypatch.setattr(limits, "DRAIN_SECONDS", 0.1)

    async def test(application: Application, middleware: RequestLimits) -> None:
        endless = Sent(*[b"x" * 1000] * 100)
        answer = await ask(middleware, [(b"content-length", b"100000")], endless)
        assert answer is not None and answer[0] == 413 and endless.num_read == 5
        stalled = Sent(b"")
        stalled.num_read = 1
        answer = await ask(middleware, [(b"content-length", b"100000")], stalled)
        assert answer is not None and answer[0] == 413

    run(test)


def test_what_is_no_http_passes_as_it_is() -> None:
    seen: list[Scope] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def nothing(*_: object) -> Any:
        raise AssertionError("neither read nor answered")

    asyncio.run(RequestLimits(application, MOST)({"type": "lifespan"}, nothing, nothing))
    assert seen == [{"type": "lifespan"}]
