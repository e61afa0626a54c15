"""What /v1/messages answers with: one message, or the events in which it grows."""

import uuid
from collections.abc import AsyncGenerator, Collection
from typing import Any

from server.api.generating.generation import Generation, Usage
from server.api.transport.sse import named

_PING = named("ping", {"type": "ping"})


class MessageShape:
    """How one message is worded. `stops` are the request's own: those of an adapter's manifest are a turn's end."""

    def __init__(self, model: str, stops: Collection[str]) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._model, self._stops = model, stops

    def message(self, text: str | None, finish: str | None, stop: str | int | None, usage: Usage) -> dict[str, object]:
        """`text` None: it begins."""
        return {
            "id": self.id, "type": "message", "role": "assistant", "model": self._model,
            "content": [] if text is None else [_text_block(text)], **self.ending(finish, stop), "container": None,
            "usage": {**usage_of(usage), "service_tier": "standard"},
        }  # fmt: skip

    def ending(self, finish: str | None, stop: str | int | None) -> dict[str, object]:
        matched = stop if stop in self._stops else None
        reason = {None: None, "length": "max_tokens"}.get(finish, "end_turn" if matched is None else "stop_sequence")
        return {"stop_reason": reason, "stop_sequence": matched, "stop_details": None}


def usage_of(usage: Usage) -> dict[str, object]:
    """Anthropic counts among `input_tokens` only those that were not in the cache."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens, "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens, "output_tokens": usage.completion_tokens,
    }  # fmt: skip


async def streamed(generation: Generation, shape: MessageShape) -> AsyncGenerator[bytes | None]:
    """The events of a message. Where nothing comes for a while, it is None before the first, which tells what was found
    in the cache, and a ping later."""
    has_begun = False
    finish: str | None = None
    stop: str | int | None = None
    pieces = generation.pieces()
    try:
        async for piece in pieces:
            if piece is None:
                yield _PING if has_begun else None
                continue
            if not has_begun:
                yield _opening(shape, generation.usage)
                has_begun = True
            if piece.text:
                yield _event("content_block_delta", index=0, delta={"type": "text_delta", "text": piece.text})
            finish, stop = piece.finish, piece.stop
        yield _event("content_block_stop", index=0)
        delta = {**shape.ending(finish, stop), "container": None}
        yield _event("message_delta", delta=delta, usage=usage_of(generation.usage)) + _event("message_stop")
    finally:
        await pieces.aclose()


def _opening(shape: MessageShape, usage: Usage) -> bytes:
    """Anthropic's servers ping once, too."""
    return b"".join((
        _event("message_start", message=shape.message(None, None, None, usage)),
        _event("content_block_start", index=0, content_block=_text_block("")),
        _PING,
    ))  # fmt: skip


def _text_block(text: str) -> dict[str, object]:
    return {"type": "text", "text": text, "citations": None}


def _event(type: str, **fields: Any) -> bytes:
    return named(type, {"type": type, **fields})
