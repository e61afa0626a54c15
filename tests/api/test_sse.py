"""Event streams and answers whose client may leave: what is sent, what is cancelled, what is closed."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
from fastapi import Request

from server.api.transport.sse import OPENAI, data, event_stream, unless_client_leaves
from server.errors import ClientLeft, GenerationFailed, InvalidRequest


class Client:
    """Sends what a test says, then nothing; leaves when told."""

    def __init__(self, *messages: str) -> None:
        self._messages: asyncio.Queue[str] = asyncio.Queue()
        for message in messages:
            self._messages.put_nowait(message)
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        self.request = Request(scope, self._receive)

    def leave(self) -> None:
        self._messages.put_nowait("http.disconnect")

    async def _receive(self) -> dict[str, Any]:
        return {"type": await self._messages.get()}


class Bodies:
    """A source of event bodies that knows whether it was closed."""

    def __init__(self, *items: object) -> None:
        self._items = items
        self.was_closed = False

    async def __call__(self) -> AsyncGenerator[bytes | None]:
        try:
            for item in self._items:
                if isinstance(item, Exception):
                    raise item
                if item == "wait":
                    await asyncio.Event().wait()
                yield None if item is None else data({"item": item})
        finally:
            self.was_closed = True


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(5):
            await test()

    asyncio.run(limited())


def test_what_some_readers_take_for_a_line_end_is_escaped() -> None:
    text = "".join(map(chr, range(0x2100))) + "\U0001f9f5"
    event = data({"text": text})
    assert event.decode().splitlines() == [event.decode().removesuffix("\n\n"), ""]
    assert json.loads(event.removeprefix(b"data: ")) == {"text": text}


async def stream(bodies: Bodies) -> list[str]:
    """The events that a patient client reads."""
    response = await event_stream(Client().request, bodies(), OPENAI)
    return [bytes(chunk).decode() async for chunk in response.body_iterator]  # type: ignore[arg-type]


def test_bodies_become_events_and_the_last_is_done() -> None:
    async def test() -> None:
        bodies = Bodies("a", "ü\n\nb")
        events = await stream(bodies)
        assert events == ['data: {"item":"a"}\n\n', 'data: {"item":"ü\\n\\nb"}\n\n', "data: [DONE]\n\n"]
        assert bodies.was_closed

    run(test)


def test_where_nothing_comes_a_comment_is_sent_that_clients_pass_over() -> None:
    async def test() -> None:
        assert await stream(Bodies(None, "a", None)) == [
            ": keep-alive\n\n", 'data: {"item":"a"}\n\n', ": keep-alive\n\n", "data: [DONE]\n\n",
        ]  # fmt: skip

    run(test)


def test_a_stream_is_kept_by_no_cache_and_held_back_by_no_proxy() -> None:
    async def test() -> None:
        response = await event_stream(Client().request, Bodies("a")(), OPENAI)
        assert response.status_code == 200 and response.media_type == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"

    run(test)


def test_what_fails_before_its_first_event_gets_its_own_status() -> None:
    async def test() -> None:
        refusal = InvalidRequest("no")
        with pytest.raises(InvalidRequest) as raised:
            await event_stream(Client().request, Bodies(refusal)(), OPENAI)
        assert raised.value is refusal

    run(test)


def test_what_fails_later_ends_with_an_error_event_and_without_done() -> None:
    async def test() -> None:
        bodies = Bodies("a", GenerationFailed("gone"))
        first, last = await stream(bodies)
        error = json.loads(last.removeprefix("data: "))["error"]
        assert '"a"' in first and (error["message"], error["code"]) == ("gone", "generation_failed")
        assert bodies.was_closed

    run(test)


def test_what_fails_later_by_our_own_fault_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        _, last = await stream(Bodies("a", KeyError("/home/secret")))
        assert "internal error" in last and "secret" not in last
        assert "unexpected error in POST /v1/completions" in caplog.text and "secret" in caplog.text

    with caplog.at_level(logging.ERROR, "heddle.api"):
        run(test)


def test_a_client_that_leaves_in_the_middle_closes_the_source() -> None:
    async def test() -> None:
        bodies = Bodies("a", "b", "wait")
        response = await event_stream(Client().request, bodies(), OPENAI)
        assert b'"a"' in await anext(aiter(response.body_iterator))  # type: ignore[operator]
        await response.body_iterator.aclose()  # type: ignore[union-attr]
        assert bodies.was_closed

    run(test)


def test_a_client_that_leaves_before_the_first_event_closes_the_source() -> None:
    async def test() -> None:
        client, bodies = Client(), Bodies("wait")
        client.leave()
        with pytest.raises(ClientLeft):
            await event_stream(client.request, bodies(), OPENAI)
        assert bodies.was_closed

    run(test)


def test_the_result_of_the_work_is_the_answer_whatever_else_the_client_sends() -> None:
    async def work() -> int:
        await asyncio.sleep(0.01)
        return 7

    async def test() -> None:
        client = Client("http.request", "http.request")
        assert await unless_client_leaves(client.request, work()) == 7
        assert len(asyncio.all_tasks()) == 1  # nobody listens for its leaving any more

    run(test)


def test_the_failure_of_the_work_is_raised_as_it_is() -> None:
    async def work() -> None:
        raise InvalidRequest("no")

    async def test() -> None:
        with pytest.raises(InvalidRequest):
            await unless_client_leaves(Client().request, work())

    run(test)


def test_work_is_cancelled_when_nobody_waits_for_it() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # giving back may take a while, and is waited for
            ended.append("given back")

    async def leaving() -> None:
        client = Client("http.request")
        client.leave()
        with pytest.raises(ClientLeft):
            await unless_client_leaves(client.request, work())
        assert ended == ["given back"]

    async def cancelled() -> None:
        asking = asyncio.create_task(unless_client_leaves(Client().request, work()))
        await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert ended == ["given back"] * 2

    run(leaving)
    run(cancelled)


def test_work_that_is_done_when_its_client_leaves_is_still_the_answer() -> None:
    async def work() -> int:
        return 7

    async def test() -> None:
        client = Client()
        client.leave()
        assert await unless_client_leaves(client.request, work()) == 7

    run(test)
