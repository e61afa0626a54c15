"""What /v1/messages answers with: one message, or the events in which it grows."""

import uuid
from collections.abc import AsyncGenerator, Collection
from typing import Any, cast

from pydantic_core import from_json

from server.api.generating.choice import CALLED
from server.api.generating.generation import Generation, Usage
from server.api.generating.parts import Kind, Part, Parts, Stage, Step
from server.api.protocol.calls_made import not_an_object
from server.api.texts.speech import Speaker
from server.api.transport.sse import named

# clients send thinking back as thinking only if there is a signature
_SIGNATURE = "unsigned"
_PING = named("ping", {"type": "ping"})


class MessageShape:
    """How one message is worded: `begun` while it grows, `ended` when it is whole. A block is a part of the answer.
    `stops` are the request's own: those of an adapter's manifest are a turn's end."""

    def __init__(self, generation: Generation, stops: Collection[str]) -> None:
        self.parts = Parts(cast(Speaker, generation.speaker).new_call_id)
        self._stops = stops
        self._always: dict[str, object] = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant",
                                           "model": generation.wanted.meant.model}  # fmt: skip

    def begun(self, usage: Usage) -> dict[str, object]:
        return self._message([], usage)

    def ended(self, usage: Usage) -> dict[str, object]:
        return self._message([_block(it) for it in self.parts.all], usage)

    def _message(self, content: list[dict[str, object]], usage: Usage) -> dict[str, object]:
        told = {**usage_of(usage), "service_tier": "standard"}
        return {**self._always, "content": content, **self.ending(), "container": None, "usage": told}

    def ending(self) -> dict[str, object]:
        finish, stop = self.parts.finish, self.parts.stop
        matched = stop if stop in self._stops and finish == "stop" else None
        reasons = {None: None, "length": "max_tokens", CALLED: "tool_use"}
        reason = reasons.get(finish, "end_turn" if matched is None else "stop_sequence")
        return {"stop_reason": reason, "stop_sequence": matched, "stop_details": None}


def usage_of(usage: Usage) -> dict[str, object]:
    """Anthropic counts among `input_tokens` only those that were not in the cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens, "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens, "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
    }  # fmt: skip


async def whole(generation: Generation, shape: MessageShape) -> dict[str, object]:
    async for piece in generation.pieces():
        for _ in shape.parts.take(piece) if piece is not None else ():
            pass
    return shape.ended(generation.usage)


async def streamed(generation: Generation, shape: MessageShape) -> AsyncGenerator[bytes | None]:
    """The events of a message. Where nothing comes for a while, it is None before the first, which tells what was found
    in the cache, and a ping later."""
    has_begun = False
    pieces = generation.pieces()
    try:
        async for piece in pieces:
            if piece is None:
                yield _PING if has_begun else None
                continue
            if not has_begun:
                yield _event("message_start", message=shape.begun(generation.usage))
                has_begun = True
            if told := b"".join(map(_worded, shape.parts.take(piece))):
                yield told
        delta = {**shape.ending(), "container": None}
        yield _event("message_delta", delta=delta, usage=usage_of(generation.usage)) + _event("message_stop")
    finally:
        await pieces.aclose()


def _worded(step: Step) -> bytes:
    """Anthropic's servers ping once where the first block begins, too."""
    part, stage, text, _ = step
    if stage is Stage.BEGINS:
        begins = _event("content_block_start", index=part.index, content_block=_block(part))
        return begins if part.index else begins + _PING
    if stage is Stage.GROWS:
        return _delta(part, text) if text else b""
    stop = _event("content_block_stop", index=part.index)
    if part.kind is not Kind.REASONING:
        return stop
    signed = {"type": "signature_delta", "signature": _SIGNATURE}
    return _event("content_block_delta", index=part.index, delta=signed) + stop


_DELTAS = {Kind.REASONING: ("thinking_delta", "thinking"), Kind.TEXT: ("text_delta", "text"),
           Kind.CALL: ("input_json_delta", "partial_json")}  # fmt: skip


def _delta(part: Part, text: str) -> bytes:
    type, field = _DELTAS[part.kind]
    return _event("content_block_delta", index=part.index, delta={"type": type, field: text})


def _block(part: Part) -> dict[str, object]:
    if part.kind is Kind.REASONING:
        return {"type": "thinking", "thinking": part.text, "signature": _SIGNATURE if part.text else ""}
    if part.kind is Kind.CALL:
        return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": _input(part)}
    return {"type": "text", "text": part.text, "citations": None}


def _input(part: Part) -> dict[str, Any]:
    """Of a call that was cut off what had come of it, as Anthropic's client reads a stream."""
    try:
        value = from_json(part.text or "{}", allow_partial=part.is_cut)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else not_an_object(part.text)


def _event(type: str, **fields: Any) -> bytes:
    return named(type, {"type": type, **fields})
