"""The events of a message, of what a test says is generated: as Anthropic's client types them, and as it reads them."""

import asyncio
from typing import Any

import anthropic
import httpx2
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from fastapi import Request, Response

from server.api.generating.choice import CALLED
from server.api.generating.message_answers import MessageShape, streamed, whole
from server.api.generating.messages import _ending
from server.api.texts.speech import CallPiece
from server.api.transport.sse import event_stream
from server.errors import GenerationFailed, HeddleError, Overloaded
from tests.support.schemas import NOT_OF_MESSAGES, checked
from tests.support.scripted import ScriptedGeneration, app_at, said, typed_events


def events_of(generation: Any, *stops: str) -> list[dict[str, Any] | None]:
    return typed_events(streamed(generation, MessageShape(generation, stops)))


def whole_of(generation: Any, *stops: str) -> Message:
    body = asyncio.run(whole(generation, MessageShape(generation, stops)))
    message: Message = checked(Message, body, NOT_OF_MESSAGES)
    return message


def test_a_message_grows_in_typed_events() -> None:
    generation = ScriptedGeneration(said("ab"), said("c"), said(finish="stop"))
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
    generation = ScriptedGeneration(said(begins=True), None, said("a", finish="stop"))
    assert [it and it["type"] for it in events_of(generation)][:5] == [
        "message_start", "ping", "content_block_start", "ping", "content_block_delta",
    ]  # fmt: skip


def test_thinking_text_and_calls_are_blocks_of_their_own() -> None:
    script = (
        said(reasoning="Hm"), said(reasoning=", so."), said("Let me", calls=[CallPiece(0, "weather", '{"ci')]),
        said(calls=[CallPiece(0, None, 'ty": "Lyon"}'), CallPiece(1, "time", "{}")], finish=CALLED),
    )  # fmt: skip
    events: list[Any] = [it for it in events_of(ScriptedGeneration(*script)) if it["type"] != "ping"]  # type: ignore[index]
    typed = [checked(RawMessageStreamEvent, it, NOT_OF_MESSAGES) for it in events]
    told = [(it.type.removeprefix("content_block_"), it.index) for it in typed[1:-2]]
    assert told == [
        ("start", 0), ("delta", 0), ("delta", 0), ("delta", 0), ("stop", 0), ("start", 1), ("delta", 1), ("stop", 1),
        ("start", 2), ("delta", 2), ("delta", 2), ("stop", 2), ("start", 3), ("delta", 3), ("stop", 3),
    ]  # fmt: skip
    assert [it.delta.type for it in typed if it.type == "content_block_delta"] == [
        "thinking_delta", "thinking_delta", "signature_delta", "text_delta", *["input_json_delta"] * 3,
    ]  # fmt: skip
    assert typed[-2].delta.stop_reason == "tool_use"
    message = whole_of(ScriptedGeneration(*script))
    assert [it.type for it in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    thinking, text, first, second = message.content
    assert thinking.type == "thinking" and thinking.thinking == "Hm, so." and thinking.signature
    assert text.type == "text" and text.text == "Let me" and message.stop_reason == "tool_use"
    assert first.type == second.type == "tool_use" and (first.id, second.id) == ("call00001", "call00002")
    assert first.input == {"city": "Lyon"} and second.input == {}


@pytest.mark.parametrize(
    ("arguments", "finish", "input"),
    [
        ('{"a": [1, {"b": "c', "length", {"a": [1, {}]}),
        ("", "length", {}),
        ('{"a": tru}', CALLED, {"INVALID_JSON": '{"a": tru}'}),
    ],
)
def test_input_of_a_call_that_is_not_whole_is_what_has_come_of_it(arguments: str, finish: str, input: Any) -> None:
    message = whole_of(ScriptedGeneration(said(calls=[CallPiece(0, "time", arguments)], finish=finish)))
    assert message.content[0].type == "tool_use" and message.content[0].input == input
    assert message.stop_reason == ("max_tokens" if finish == "length" else "tool_use")


def test_an_answer_without_words_is_an_empty_text() -> None:
    assert [it.type for it in whole_of(ScriptedGeneration(said(finish="stop"))).content] == ["text"]


def test_thinking_is_counted() -> None:
    generation = ScriptedGeneration(said(reasoning="Hm"), said("a", finish="stop"))
    generation.usage.reasoning_tokens = 2
    details = whole_of(generation).usage.output_tokens_details
    assert details is not None and details.thinking_tokens == 2


def test_input_tokens_are_those_that_were_not_in_the_cache() -> None:
    start, *_, delta, _ = events_of(ScriptedGeneration(said("a", finish="stop")))
    assert start is not None and delta is not None
    for usage in (start["message"]["usage"], delta["usage"]):
        assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]) == (
            4, 16, 0,
        )  # fmt: skip


def test_who_waits_gets_a_comment_and_then_pings() -> None:
    """What was found in the cache is known with the first token, and told with the first event."""
    events = events_of(ScriptedGeneration(None, said("a"), None, said("b", finish="stop")))
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
        (CALLED, "END", "tool_use", None),
    ],
)
def test_why_it_ended(finish: str, stop: Any, reason: str, sequence: str | None) -> None:
    generation: Any = ScriptedGeneration(said("a", finish=finish, stop=stop))
    message = whole_of(generation, "END")
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
        generation: Any = ScriptedGeneration(said("ab"), error)
        return await event_stream(request, streamed(generation, MessageShape(generation, ())), _ending(request))

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
