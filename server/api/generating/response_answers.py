"""What /v1/responses answers with: one Response object, or the typed events in which it grows."""

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import msgspec

from server.api.generating.choice import TokenTold
from server.api.generating.generation import Completed, Generation, Usage
from server.api.generating.told import ChatWords, joined, worded
from server.api.protocol.responses import ResponseBody
from server.api.texts.decoding import TokenTexts
from server.api.transport.sse import named

_PLACE = {"output_index": 0, "content_index": 0}  # an answer is one message, of one text


class ResponseShape:
    """How one response is worded: `begun` while it grows, `ended` when it is whole."""

    def __init__(self, body: ResponseBody, generation: Generation, texts: TokenTexts) -> None:
        self.item_id = f"msg_{uuid.uuid4().hex}"
        self._words = ChatWords(texts) if body.tells_logprobs else None
        self._told: list[bytes] = []  # log-probabilities of what has come
        wanted, vocab_size = generation.wanted, generation.service.info.vocab_size
        sampling = wanted.sampling(seed=0, vocab_size=vocab_size)
        self._always: dict[str, object] = {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()),
            "model": wanted.meant.model, "background": False, "error": None, "conversation": None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls, "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None, "prompt": None,
            "prompt_cache_key": body.prompt_cache_key, "prompt_cache_retention": None,
            "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
            "safety_identifier": body.safety_identifier, "service_tier": "default", "store": False,
            "temperature": sampling.temperature, "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto", "tools": [], "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p, "truncation": "disabled", "user": body.user,
            "frequency_penalty": sampling.frequency, "presence_penalty": sampling.presence,
        }  # fmt: skip

    def begun(self) -> dict[str, object]:
        return self._always | {"status": "in_progress", "completed_at": None, "incomplete_details": None, "output": [],
                               "usage": None}  # fmt: skip

    async def tell(self, tokens: Sequence[TokenTold]) -> msgspec.Raw:
        """Log-probabilities of some more tokens; each is worded once."""
        if self._words is None:
            return joined(())
        told = await worded(self._words.entries(tokens), self._words.word)
        self._told += told
        return joined(told)

    def ended(self, completed: Completed, usage: Usage) -> dict[str, object]:
        is_whole = completed.finish == "stop"
        return self._always | {
            "status": "completed" if is_whole else "incomplete",
            "completed_at": int(time.time()) if is_whole else None,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": [self.item(completed)],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    def item(self, completed: Completed | None) -> dict[str, object]:
        """The message; None: it begins."""
        status = "in_progress" if completed is None else "completed" if completed.finish == "stop" else "incomplete"
        content = [] if completed is None else [self.part(completed.text)]
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def part(self, text: str) -> dict[str, object]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}

    @property
    def logprobs(self) -> msgspec.Raw:
        """Of all tokens that have come."""
        return joined(self._told)


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
    whole, has_begun = Completed(), False
    pieces = generation.pieces()
    try:
        async for piece in pieces:
            if not has_begun:
                yield _opening(shape, events)
            elif piece is None:
                yield None
            has_begun = True
            if piece is None:
                continue
            whole.take(piece)
            logprobs = await shape.tell(piece.tokens)
            if piece.text or piece.tokens:
                yield events.event("response.output_text.delta", item_id=shape.item_id, **_PLACE, delta=piece.text,
                                   logprobs=logprobs)  # fmt: skip
        yield _closing(shape, events, whole, generation.usage)
    finally:
        await pieces.aclose()


def _opening(shape: ResponseShape, events: ResponseEvents) -> bytes:
    response = shape.begun()
    return b"".join((
        events.event("response.created", response=response),
        events.event("response.in_progress", response=response),
        events.event("response.output_item.added", output_index=0, item=shape.item(None)),
        events.event("response.content_part.added", item_id=shape.item_id, **_PLACE, part=shape.part("")),
    ))  # fmt: skip


def _closing(shape: ResponseShape, events: ResponseEvents, whole: Completed, usage: Usage) -> bytes:
    response = shape.ended(whole, usage)
    return b"".join((
        events.event("response.output_text.done", item_id=shape.item_id, **_PLACE, text=whole.text,
                     logprobs=shape.logprobs),
        events.event("response.content_part.done", item_id=shape.item_id, **_PLACE, part=shape.part(whole.text)),
        events.event("response.output_item.done", output_index=0, item=shape.item(whole)),
        events.event(f"response.{response['status']}", response=response),
    ))  # fmt: skip
