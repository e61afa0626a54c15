"""The events of a response, of what a test says is generated: as OpenAI's client types them, and as it reads them."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from fastapi import Request, Response
from openai.types.responses import ResponseStreamEvent

from server.api.generating.choice import CALLED
from server.api.generating.response_events import ResponseEvents, streamed
from server.api.generating.response_items import ResponseShape
from server.api.protocol.responses import LOGPROBS, ResponseBody
from server.api.texts.speech import CallPiece
from server.api.transport.sse import Ending, event_stream
from server.errors import GenerationFailed
from tests.support.schemas import MORE_IN_RESPONSES, NOT_OF_RESPONSES, checked
from tests.support.scripted import Letters, ScriptedGeneration, app_at, said, told, typed_events


def body(**fields: Any) -> ResponseBody:
    return ResponseBody.model_construct(model="tiny", input="hi", **fields)


def shape(generation: Any, **fields: Any) -> ResponseShape:
    return ResponseShape(body(**fields), generation, Letters())  # type: ignore[arg-type]


def events_of(generation: Any, **fields: Any) -> list[dict[str, Any] | None]:
    return typed_events(streamed(generation, shape(generation, **fields), ResponseEvents()))


def test_an_answer_grows_in_typed_events() -> None:
    generation = ScriptedGeneration(said("ab"), said("c"), said(finish="stop"))
    events: list[Any] = events_of(generation)
    assert [it["type"] for it in events] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.delta", "response.output_text.done",
        "response.content_part.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [it["sequence_number"] for it in events] == list(range(10))
    typed = [checked(ResponseStreamEvent, it, NOT_OF_RESPONSES, MORE_IN_RESPONSES) for it in events]
    assert [it.type for it in typed] == [it["type"] for it in events]
    assert [typed[4].delta, typed[5].delta, typed[6].text, typed[7].part.text] == ["ab", "c", "abc", "abc"]
    assert typed[8].item == typed[9].response.output[0] and typed[9].response.output_text == "abc"
    assert typed[0].response.usage is None and typed[9].response.usage.input_tokens_details.cached_tokens == 16
    assert {typed[0].response.id, typed[1].response.id, typed[9].response.id} == {typed[0].response.id}
    assert {it.item_id for it in typed[3:8]} == {typed[2].item.id, typed[8].item.id}
    assert generation.was_closed


def test_reasoning_text_and_calls_are_items_of_their_own() -> None:
    script = (
        said(reasoning="Hm"), said(reasoning=", so."), said("Let me", calls=[CallPiece(0, "weather", '{"ci')]),
        said(calls=[CallPiece(0, None, 'ty": "Lyon"}'), CallPiece(1, "time", "{}")], finish=CALLED),
    )  # fmt: skip
    events: list[Any] = events_of(ScriptedGeneration(*script))
    assert [(it["type"].partition(".")[2], it.get("output_index")) for it in events] == [
        ("created", None), ("in_progress", None),
        ("output_item.added", 0), ("content_part.added", 0), ("reasoning_text.delta", 0), ("reasoning_text.delta", 0),
        ("reasoning_text.done", 0), ("content_part.done", 0), ("output_item.done", 0),
        ("output_item.added", 1), ("content_part.added", 1), ("output_text.delta", 1), ("output_text.done", 1),
        ("content_part.done", 1), ("output_item.done", 1),
        ("output_item.added", 2), ("function_call_arguments.delta", 2), ("function_call_arguments.delta", 2),
        ("function_call_arguments.done", 2), ("output_item.done", 2),
        ("output_item.added", 3), ("function_call_arguments.delta", 3), ("function_call_arguments.done", 3),
        ("output_item.done", 3), ("completed", None),
    ]  # fmt: skip
    assert [it["sequence_number"] for it in events] == list(range(len(events)))
    typed = [checked(ResponseStreamEvent, it, NOT_OF_RESPONSES, MORE_IN_RESPONSES) for it in events]
    done = [it.item for it in typed if it.type == "response.output_item.done"]
    assert done == typed[-1].response.output and {it.status for it in done} == {"completed"}
    assert [it.id.partition("_")[0] for it in done] == ["rs", "msg", "fc", "fc"]
    for index, item in enumerate(done):
        its = [it for it in events if it.get("output_index") == index]
        assert {it.get("item_id", item.id) for it in its} == {item.id} and its[0]["item"]["status"] == "in_progress"
    assert done[0].content[0].text == "Hm, so." and done[1].content[0].text == "Let me"
    assert [(it.name, it.arguments, it.call_id) for it in done[2:]] == [
        ("weather", '{"city": "Lyon"}', "call00001"), ("time", "{}", "call00002"),
    ]  # fmt: skip


def test_text_behind_a_call_is_another_message() -> None:
    script = said("a", calls=[CallPiece(0, "time", "{")]), said("b", calls=[CallPiece(0, None, "}")], finish=CALLED)
    events: list[Any] = events_of(ScriptedGeneration(*script))
    output = events[-1]["response"]["output"]
    assert [it["type"] for it in output] == ["message", "function_call", "message"]
    assert output[1]["arguments"] == "{}" and output[2]["content"][0]["text"] == "b"


def test_a_call_that_is_cut_off_is_the_item_that_is_not_whole() -> None:
    *_, item, last = events_of(ScriptedGeneration(said("a", calls=[CallPiece(0, "time", "{")], finish="length")))
    assert item is not None and item["item"]["status"] == "incomplete" and item["item"]["arguments"] == "{"
    assert last is not None and last["type"] == "response.incomplete"
    assert [it["status"] for it in last["response"]["output"]] == ["completed", "incomplete"]


def test_reasoning_is_counted() -> None:
    generation = ScriptedGeneration(said(reasoning="Hm"), said("a", finish="stop"))
    generation.usage.reasoning_tokens = 2
    last = events_of(generation)[-1]
    assert last is not None and last["response"]["usage"]["output_tokens_details"] == {"reasoning_tokens": 2}


def test_an_answer_that_is_cut_off_says_so() -> None:
    *_, item, last = events_of(ScriptedGeneration(said("ab", finish="length")))
    assert item is not None and item["item"]["status"] == "incomplete"
    assert last is not None and last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["response"]["completed_at"] is None


def test_an_answer_without_words_is_whole_as_well() -> None:
    events: list[Any] = events_of(ScriptedGeneration(said(finish="stop")))
    assert "response.output_text.delta" not in {it["type"] for it in events}
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_who_waits_hears_first_that_it_has_begun() -> None:
    events = events_of(ScriptedGeneration(None, None, said("a"), None, said("b", finish="stop")))
    assert [it and it["type"].partition(".")[2] for it in events][:8] == [
        "created", "in_progress", None, "output_item.added", "content_part.added", "output_text.delta", None,
        "output_text.delta",
    ]  # fmt: skip


def test_it_begins_with_a_first_token_that_has_no_text() -> None:
    events = events_of(ScriptedGeneration(said(begins=True), said("a", finish="stop")))
    assert [it and it["type"].partition(".")[2] for it in events][:5] == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
    ]  # fmt: skip
    assert events[4] is not None and events[4]["delta"] == "a"


def test_logprobs_come_with_their_text_and_again_with_all_of_it() -> None:
    script = said("ab", tokens=told("ab")), said("c", tokens=told("c", 2), finish="stop")
    events: list[Any] = events_of(ScriptedGeneration(*script), include=[LOGPROBS], top_logprobs=1)
    for it in events:
        checked(ResponseStreamEvent, it, NOT_OF_RESPONSES, MORE_IN_RESPONSES)
    deltas = [it["logprobs"] for it in events if it["type"] == "response.output_text.delta"]
    whole = next(it["logprobs"] for it in events if it["type"] == "response.output_text.done")
    assert [[entry["token"] for entry in delta] for delta in deltas] == [["a", "b"], ["c"]]
    assert whole == sum(deltas, []) == events[-1]["response"]["output"][0]["content"][0]["logprobs"]
    assert whole[0] == {"token": "a", "logprob": -1.5, "bytes": [97],
                        "top_logprobs": [{"token": "z", "logprob": -0.5, "bytes": [122]}]}  # fmt: skip


def test_logprobs_are_those_of_the_text_alone() -> None:
    script = (
        said(reasoning="ab", tokens=told("ab"), num_reasoning=1), said("c", tokens=told("c", 2)),
        said(calls=[CallPiece(0, "time", "{}")], tokens=told("{}", 3), finish=CALLED),
    )  # fmt: skip
    events: list[Any] = events_of(ScriptedGeneration(*script), include=[LOGPROBS])
    message = events[-1]["response"]["output"][1]
    assert [it["token"] for it in message["content"][0]["logprobs"]] == ["c"]


def test_logprobs_that_nobody_asked_for_are_empty() -> None:
    events: list[Any] = events_of(ScriptedGeneration(said("ab", tokens=told("ab"), finish="stop")))
    assert all(it.get("logprobs", []) == [] for it in events)


def test_what_fails_later_is_an_error_to_openais_client() -> None:
    """Also to one who reads nothing but the text."""

    async def answer(request: Request) -> Response:
        generation: Any = ScriptedGeneration(said("ab"), GenerationFailed("gone"))
        events = ResponseEvents()
        return await event_stream(request, streamed(generation, shape(generation), events), Ending(b"", events.failed))

    async def ask() -> None:
        transport = httpx.ASGITransport(app_at("/v1/responses", answer))
        async with (
            httpx.AsyncClient(transport=transport) as http,
            openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http) as client,
        ):
            text = ""
            with pytest.raises(openai.APIError, match="gone"):
                async for event in await client.responses.create(model="tiny", input="hi", stream=True):
                    text += event.delta if event.type == "response.output_text.delta" else ""
            assert text == "ab"
            with pytest.raises(openai.APIError, match="gone"):
                async with client.responses.stream(model="tiny", input="hi") as stream:
                    await stream.get_final_response()
            raw = (await http.post("http://test/v1/responses", json={})).text.strip().split("\n\n")[-1]
        name, data = raw.split("\n")
        error = checked(ResponseStreamEvent, json.loads(data.removeprefix("data: ")), more={"error"})
        assert name == "event: error" and (error.message, error.code) == ("gone", "generation_failed")
        assert error.sequence_number == 5

    asyncio.run(ask())
