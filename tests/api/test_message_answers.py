"""The events of a message, of what a test says is generated: as Anthropic's client types them, and as it reads them."""

import asyncio
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from fastapi import Request, Response

from server.api.generating.choice import Piece
from server.api.generating.message_answers import MessageShape, streamed
from server.api.generating.messages import _ending
from server.api.transport.sse import event_stream
from server.errors import GenerationFailed, HeddleError, Overloaded
from tests.support.schemas import NOT_OF_MESSAGES, checked
from tests.support.scripted import ScriptedGeneration, app_at, typed_events


def events_of(generation: Any, *stops: str) -> list[dict[str, Any] | None]:
    return typed_events(streamed(generation, MessageShape("tiny", stops)))


def test_a_message_grows_in_typed_events() -> None:
    generation = ScriptedGeneration(Piece(0, "ab"), Piece(0, "c"), Piece(0, "", finish="stop"))
    events: list[Any] = events_of(generation)
    assert [it["type"] for it in events] == [
        "message_start", "content_block_start", "ping", "content_block_delta", "content_block_delta",
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    typed = [checked(RawMessageStreamEvent, it, NOT_OF_MESSAGES) for it in events if it["type"] != "ping"]
    assert typed[0].message.content == [] and typed[0].message.stop_reason is None
    assert [it.delta.text for it in typed[2:4]] == ["ab", "c"]
    assert typed[-2].delta.stop_reason == "end_turn" and typed[-2].usage.output_tokens == 3
    assert generation.was_closed


def test_it_begins_with_a_first_token_that_has_no_text() -> None:
    generation = ScriptedGeneration(Piece(0, "", begins=True), None, Piece(0, "a", finish="stop"))
    assert [it and it["type"] for it in events_of(generation)][:5] == [
        "message_start", "content_block_start", "ping", "ping", "content_block_delta",
    ]  # fmt: skip


def test_input_tokens_are_those_that_were_not_in_the_cache() -> None:
    start, *_, delta, _ = events_of(ScriptedGeneration(Piece(0, "a", finish="stop")))
    assert start is not None and delta is not None
    for usage in (start["message"]["usage"], delta["usage"]):
        assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]) == (
            4, 16, 0,
        )  # fmt: skip


def test_who_waits_gets_a_comment_and_then_pings() -> None:
    """What was found in the cache is known with the first token, and told with the first event."""
    events = events_of(ScriptedGeneration(None, Piece(0, "a"), None, Piece(0, "b", finish="stop")))
    assert [it and it["type"] for it in events][:6] == [
        None, "message_start", "content_block_start", "ping", "content_block_delta", "ping",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("finish", "stop", "reason", "sequence"),
    [
        ("length", None, "max_tokens", None),
        ("stop", None, "end_turn", None),
        ("stop", "END", "stop_sequence", "END"),
        ("stop", "of the manifest", "end_turn", None),
        ("stop", 7, "end_turn", None),
    ],
)
def test_why_it_ended(finish: str, stop: Any, reason: str, sequence: str | None) -> None:
    generation: Any = ScriptedGeneration(Piece(0, "a", finish=finish, stop=stop))
    body = MessageShape("tiny", ["END"]).message("a", finish, stop, generation.usage)
    message = checked(Message, body, NOT_OF_MESSAGES)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)
    delta: Any = events_of(generation, "END")[-2]
    assert (delta["delta"]["stop_reason"], delta["delta"]["stop_sequence"]) == (reason, sequence)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(GenerationFailed("gone"), "api_error"), (Overloaded("gone"), "overloaded_error")],
    ids=lambda it: type(it).__name__,
)
def test_what_fails_later_is_an_error_to_anthropics_client(error: HeddleError, kind: str) -> None:
    async def answer(request: Request) -> Response:
        generation: Any = ScriptedGeneration(Piece(0, "ab"), error)
        return await event_stream(request, streamed(generation, MessageShape("tiny", ())), _ending(request))

    async def ask() -> None:
        transport = httpx2.ASGITransport(app_at("/v1/messages", answer))
        arguments: Any = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
        async with (
            httpx2.AsyncClient(transport=transport) as http,
            anthropic.AsyncAnthropic(base_url="http://test", api_key="x", max_retries=0, http_client=http) as client,
        ):
            text = ""
            with pytest.raises(anthropic.APIStatusError) as raised:
                async with client.messages.stream(**arguments) as stream:
                    async for piece in stream.text_stream:
                        text += piece
            assert text == "ab" and raised.value.type == kind and raised.value.api_message == "gone"
            assert isinstance(raised.value.body, dict) and set(raised.value.body) == {"type", "error", "request_id"}

    asyncio.run(ask())
