"""How a response is worded: the object, and the items of its output."""

import time
import uuid
from collections.abc import Sequence
from typing import cast

import msgspec

from server.api.generating.choice import TokenTold
from server.api.generating.generation import Generation, Usage
from server.api.generating.parts import Kind, Part, Parts
from server.api.generating.told import ChatWords, joined, worded
from server.api.protocol.responses import ResponseBody
from server.api.texts.decoding import TokenTexts
from server.api.texts.speech import Speaker

_PREFIXES = {Kind.REASONING: "rs", Kind.TEXT: "msg", Kind.CALL: "fc"}


class ResponseShape:
    """One response: `begun` while it grows, `ended` when it is whole. An item of its output is a part of the answer."""

    def __init__(self, body: ResponseBody, generation: Generation, texts: TokenTexts) -> None:
        self.parts = Parts(cast(Speaker, generation.speaker).new_call_id)
        self._ids: dict[Part, str] = {}
        self._words = ChatWords(texts) if body.tells_logprobs else None
        self._told: dict[Part, list[bytes]] = {}  # log-probabilities of what has come
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
            "temperature": sampling.temperature, "text": {"format": body.format_told},
            "tool_choice": body.choice_told, "tools": body.tools_told, "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p, "truncation": "disabled", "user": body.user,
            "frequency_penalty": sampling.frequency, "presence_penalty": sampling.presence,
        }  # fmt: skip

    def begun(self) -> dict[str, object]:
        return self._always | {"status": "in_progress", "completed_at": None, "incomplete_details": None, "output": [],
                               "usage": None}  # fmt: skip

    def ended(self, usage: Usage) -> dict[str, object]:
        is_whole = self.parts.finish != "length"
        return self._always | {
            "status": "completed" if is_whole else "incomplete",
            "completed_at": int(time.time()) if is_whole else None,
            "incomplete_details": None if is_whole else {"reason": "max_output_tokens"},
            "output": [self.item(it) for it in self.parts.all],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }

    async def tell(self, part: Part, tokens: Sequence[TokenTold]) -> msgspec.Raw:
        """Log-probabilities of some more tokens of a text; each is worded once."""
        if self._words is None:
            return joined(())
        told = await worded(self._words.entries(tokens), self._words.word)
        self._told.setdefault(part, []).extend(told)
        return joined(told)

    def logprobs(self, part: Part) -> msgspec.Raw:
        """Of all tokens of a text that have come."""
        return joined(self._told.get(part, ()))

    def id_of(self, part: Part) -> str:
        return self._ids.setdefault(part, f"{_PREFIXES[part.kind]}_{uuid.uuid4().hex}")

    def item(self, part: Part, begins: bool = False) -> dict[str, object]:
        status = "in_progress" if begins else "incomplete" if part.is_cut else "completed"
        if part.kind is Kind.CALL:
            return {"id": self.id_of(part), "type": "function_call", "status": status, "call_id": part.call_id,
                    "name": part.name, "arguments": part.text}  # fmt: skip
        content = [] if begins else [self.content(part)]
        if part.kind is Kind.REASONING:
            return {"id": self.id_of(part), "type": "reasoning", "status": status, "summary": [], "content": content,
                    "encrypted_content": None}  # fmt: skip
        return {"id": self.id_of(part), "type": "message", "role": "assistant", "status": status, "content": content}

    def content(self, part: Part) -> dict[str, object]:
        """What an item of reasoning, or a message, consists of."""
        if part.kind is Kind.REASONING:
            return {"type": "reasoning_text", "text": part.text}
        return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": self.logprobs(part)}
