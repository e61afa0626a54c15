"""The typed events in which a response grows."""

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from server.api.generating.generation import Generation
from server.api.generating.parts import Kind, Part, Stage, Step
from server.api.generating.response_items import ResponseShape
from server.api.transport.sse import named

_TEXTS = {Kind.REASONING: "response.reasoning_text", Kind.TEXT: "response.output_text",
          Kind.CALL: "response.function_call_arguments"}  # fmt: skip


class ResponseEvents:
    """Numbers the events of one stream."""

    def __init__(self) -> None:
        self._number = 0

    def event(self, type: str, **fields: Any) -> bytes:
        body = {"type": type, "sequence_number": self._number, **fields}
        self._number += 1
        return named(type, body)

    def failed(self, body: Mapping[str, object]) -> bytes:
        """`response.failed` would only be one more event to those who read pieces of text. OpenAI's client raises for
        an event that has `error` in it, as OpenAI's server sends it, though its own type has the fields beside it."""
        error: Any = body["error"]
        return self.event("error", code=error["code"], message=error["message"], param=error["param"], error=error)


async def streamed(
    generation: Generation, shape: ResponseShape, events: ResponseEvents
) -> AsyncGenerator[bytes | None]:
    """The events of a response, and None where nothing comes for a while."""
    has_begun = False
    pieces = generation.pieces()
    try:
        async for piece in pieces:
            if not has_begun:
                response = shape.begun()
                yield events.event("response.created", response=response) + events.event(
                    "response.in_progress", response=response
                )
            elif piece is None:
                yield None
            has_begun = True
            if piece is None:
                continue
            if told := b"".join([await _worded(step, shape, events) for step in shape.parts.take(piece)]):
                yield told
        response = shape.ended(generation.usage)
        yield events.event(f"response.{response['status']}", response=response)
    finally:
        await pieces.aclose()


async def _worded(step: Step, shape: ResponseShape, events: ResponseEvents) -> bytes:
    part, place = step.part, _place(step.part, shape)
    if step.stage is Stage.GROWS:
        more: dict[str, object] = {"delta": step.text}
        if part.kind is Kind.TEXT:
            more["logprobs"] = await shape.tell(part, step.tokens)
        return events.event(f"{_TEXTS[part.kind]}.delta", **place, **more)
    if step.stage is Stage.BEGINS:
        added = events.event("response.output_item.added", output_index=part.index, item=shape.item(part, begins=True))
        if part.kind is Kind.CALL:
            return added
        return added + events.event("response.content_part.added", **place, part=shape.content(part))
    return _ending(part, shape, events)


def _ending(part: Part, shape: ResponseShape, events: ResponseEvents) -> bytes:
    place = _place(part, shape)
    whole: dict[str, object] = {"arguments" if part.kind is Kind.CALL else "text": part.text}
    if part.kind is Kind.TEXT:
        whole["logprobs"] = shape.logprobs(part)
    done = events.event(f"{_TEXTS[part.kind]}.done", **place, **whole)
    if part.kind is not Kind.CALL:
        done += events.event("response.content_part.done", **place, part=shape.content(part))
    return done + events.event("response.output_item.done", output_index=part.index, item=shape.item(part))


def _place(part: Part, shape: ResponseShape) -> dict[str, object]:
    """Of an item's text; there is one in each."""
    place: dict[str, object] = {"item_id": shape.id_of(part), "output_index": part.index}
    return place if part.kind is Kind.CALL else {**place, "content_index": 0}
