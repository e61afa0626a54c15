"""POST /v1/chat/completions. See completions.py for a request's way."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import msgspec
from fastapi import APIRouter, Request, Response

from server.api.generating.answers import Shape, answer, prompt_logprobs
from server.api.generating.choice import Piece
from server.api.generating.generation import Completed, Generation
from server.api.generating.planned import in_words_of_the_route, planned
from server.api.generating.told import ChatWords
from server.api.operation import operation, streamed
from server.api.protocol.answers.generation import ChatCompletion, ChatCompletionChunk
from server.api.protocol.chat import ChatBody
from server.api.protocol.wanted import Wanted
from server.api.service import service_of
from server.api.texts.chat_template import Conversation
from server.api.texts.decoding import TokenTexts
from server.api.texts.speech import CallPiece, Speaker
from server.api.transport.bodies import read_body
from server.engine.request import OfPrompt
from server.lifecycle.models import Meant

router = APIRouter()
_NAMES = {"thinking": "reasoning_effort"}


@router.post(
    "/v1/chat/completions",
    openapi_extra=operation(
        {200: streamed(ChatCompletion, ChatCompletionChunk)}, takes=ChatBody, refuses=(404, 422, 429, 504)
    ),
)
async def chat_completions(request: Request) -> Response:
    service, body = service_of(request), await read_body(request, ChatBody)
    meant = service.meaning_of(body.model, body.who)
    with in_words_of_the_route(_NAMES):
        async with planned(request, wanted(body, meant), conversation(body)) as generation:
            shape = ChatShape(meant, service.text.token_texts, body, cast(Speaker, generation.speaker))
            return await answer(request, generation, shape, bool(body.stream), body.include_usage)


def conversation(body: ChatBody) -> Conversation:
    variables: Mapping[str, Any] = body.chat_template_kwargs or {}
    if body.reasoning_effort is not None:
        variables = {**variables, "reasoning_effort": body.reasoning_effort}
    continues = bool(body.continue_final_message)
    asks = body.add_generation_prompt is not False and not continues
    tools = () if body.tools_wanted is None else body.tools_wanted.tools
    thinks = False if body.reasoning_effort == "none" else None
    return Conversation([it.said for it in body.messages], variables, asks, continues, tools, thinks)


def wanted(body: ChatBody, meant: Meant) -> Wanted:
    wanted = body.wanted(
        meant,
        max_tokens=body.max_tokens or body.max_completion_tokens,
        best_of=body.n or 1,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        of_prompt=None if body.prompt_logprobs is None else OfPrompt(body.prompt_logprobs),
    )
    return wanted if body.tools_wanted is None else replace(wanted, tools=body.tools_wanted)


class ChatShape(Shape):
    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, meant: Meant, texts: TokenTexts, body: ChatBody, speaker: Speaker) -> None:
        super().__init__(meant)
        self._texts, self._speaker = texts, speaker
        self._words = ChatWords(texts) if body.logprobs else None
        self._tells_reasoning = body.include_reasoning is not False

    async def whole(self, completed: Sequence[Completed], generation: Generation) -> dict[str, object]:
        choices = [
            {"index": index, "message": self._message(it), "finish_reason": it.finish, "stop_reason": it.stop,
             "logprobs": None if self._words is None else _content(await self._words.all(it.tokens))}
            for index, it in enumerate(completed)
        ]  # fmt: skip
        told = completed[0].of_prompt
        if told is None or told.logprobs is None:
            return self.body(self.object_name, choices)
        worded = await prompt_logprobs(generation.prompts[0], told.logprobs, self._texts)
        return self.body(self.object_name, choices, prompt_logprobs=worded)

    def _message(self, it: Completed) -> dict[str, object]:
        content = None if it.calls and not it.content else it.content
        message: dict[str, object] = {"role": "assistant", "content": content, "refusal": None}
        if it.reasoning and self._tells_reasoning:
            message["reasoning_content"] = it.reasoning
        if it.calls:
            message["tool_calls"] = [
                {"id": self._speaker.new_call_id(), "type": "function",
                 "function": {"name": call.name, "arguments": call.arguments}}
                for call in it.calls
            ]  # fmt: skip
        return message

    async def ready(self, piece: Piece) -> Sequence[Piece]:
        said = piece.said
        if said.reasoning and not self._tells_reasoning:
            is_all = not (said.content or said.calls or piece.tokens or piece.finish or piece.begins)
            return () if is_all else (replace(piece, said=said._replace(reasoning="")),)
        return (piece,)

    def chunk_choice(self, piece: Piece, is_first: bool) -> dict[str, object]:
        content, reasoning, calls = piece.said
        delta: dict[str, object] = {"role": "assistant"} if is_first else {}
        if content or (is_first and not reasoning and not calls):
            delta["content"] = content
        if reasoning:
            delta["reasoning_content"] = reasoning
        if calls:
            delta["tool_calls"] = [self._call(it) for it in calls]
        logprobs = None if self._words is None else _content(self._words.at_once(piece.tokens))
        choice: dict[str, object] = {"index": piece.index, "delta": delta, "finish_reason": piece.finish,
                                     "logprobs": logprobs}  # fmt: skip
        if piece.finish is not None:
            choice["stop_reason"] = piece.stop
        return choice

    def _call(self, it: CallPiece) -> dict[str, object]:
        if it.name is None:
            return {"index": it.index, "function": {"arguments": it.arguments}}
        function = {"name": it.name, "arguments": it.arguments}
        return {"index": it.index, "id": self._speaker.new_call_id(), "type": "function", "function": function}


def _content(entries: msgspec.Raw) -> dict[str, object]:
    return {"content": entries, "refusal": None}
