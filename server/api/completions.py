"""POST /v1/completions and /v1/chat/completions.

A request's way: parse and refuse (bodies, protocol) -> room for it (service.admit) -> prompt to tokens (text) -> sizes,
seeds and adapter (generation.plan) -> engine client -> pieces of text -> one JSON body, or events.
"""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator
from typing import cast

from fastapi import APIRouter, Request, Response

from server.api.bodies import read_body
from server.api.errors import respond
from server.api.generation import Generation, Piece, Wanted, plan
from server.api.protocol import ChatBody, CompletionBody, GenerationBody
from server.api.service import service_of
from server.api.sse import event_stream, unless_client_leaves
from server.lifecycle.models import Meant

router = APIRouter()
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions; chat may fill the context


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    service, body = service_of(request), await read_body(request, CompletionBody)
    meant = service.meaning_of(body.model, body.user)  # an unknown model is the first thing to say
    num_sequences = len(body.prompt) * (body.n or 1)
    with service.admit(num_sequences) as admission, service.lease(meant, num_sequences) as lease:
        texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
        prompts = cast(list[list[int]], body.prompt)
        if texts:
            prompts = await unless_client_leaves(request, service.encode(texts, "prompt"))
        default = None if meant.manifest.sampling.max_tokens else DEFAULT_COMPLETION_TOKENS
        wanted = Wanted(body, meant, body.max_tokens or default)
        generation = plan(service, wanted, prompts, admission, lease)
        return await _answer(request, body, generation, CompletionShape(meant))


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    service, body = service_of(request), await read_body(request, ChatBody)
    meant = service.meaning_of(body.model, body.user)
    with service.admit(body.n or 1) as admission, service.lease(meant, body.n or 1) as lease:
        messages = [{"role": message.template_role, "content": message.text} for message in body.messages]
        encoding = service.encode_chat(messages, meant.manifest.chat_template)
        prompt = await unless_client_leaves(request, encoding)
        wanted = Wanted(body, meant, body.max_tokens or body.max_completion_tokens)
        generation = plan(service, wanted, [prompt], admission, lease)
        return await _answer(request, body, generation, ChatShape(meant))


class Shape(ABC):
    """How one of the two routes words its answers."""

    def __init__(self, meant: Meant) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = meant.model
        self.fingerprint = f"fp_{meant.ref.revision[:16]}" if meant.ref is not None else None

    prefix: str
    object_name: str
    chunk_name: str

    @abstractmethod
    def choice(self, index: int, text: str, finish: str) -> dict[str, object]: ...

    @abstractmethod
    def chunk_choice(self, piece: Piece, is_first: bool) -> dict[str, object]: ...

    def body(self, object_name: str, choices: list[dict[str, object]], **more: object) -> dict[str, object]:
        return {"id": self.id, "object": object_name, "created": self.created, "model": self.model,
                "choices": choices, **more, "system_fingerprint": self.fingerprint}  # fmt: skip


class CompletionShape(Shape):
    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, finish: str) -> dict[str, object]:
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": None}

    def chunk_choice(self, piece: Piece, is_first: bool) -> dict[str, object]:
        return {"index": piece.index, "text": piece.text, "finish_reason": piece.finish, "logprobs": None}


class ChatShape(Shape):
    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, finish: str) -> dict[str, object]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "finish_reason": finish, "logprobs": None}

    def chunk_choice(self, piece: Piece, is_first: bool) -> dict[str, object]:
        delta: dict[str, object] = {"role": "assistant", "content": piece.text} if is_first else {}
        if piece.text and not is_first:
            delta["content"] = piece.text
        return {"index": piece.index, "delta": delta, "finish_reason": piece.finish, "logprobs": None}


async def _answer(request: Request, body: GenerationBody, generation: Generation, shape: Shape) -> Response:
    if body.stream:
        return await event_stream(request, _chunks(generation, shape, body.include_usage))
    return respond(200, await unless_client_leaves(request, _whole(generation, shape)))


async def _whole(generation: Generation, shape: Shape) -> dict[str, object]:
    texts = [""] * len(generation.submissions)
    finishes = [""] * len(generation.submissions)
    async for piece in generation.pieces():
        texts[piece.index] += piece.text
        finishes[piece.index] = piece.finish or finishes[piece.index]
    choices = [shape.choice(i, text, finish) for i, (text, finish) in enumerate(zip(texts, finishes, strict=True))]
    return shape.body(shape.object_name, choices, usage=generation.usage.body())


async def _chunks(generation: Generation, shape: Shape, include_usage: bool) -> AsyncGenerator[dict[str, object]]:
    begun: set[int] = set()
    usage: dict[str, object] = {"usage": None} if include_usage else {}
    pieces = generation.pieces()
    try:
        async for piece in pieces:
            choice = shape.chunk_choice(piece, is_first=piece.index not in begun)
            begun.add(piece.index)
            yield shape.body(shape.chunk_name, [choice], **usage)
        if include_usage:
            yield shape.body(shape.chunk_name, [], usage=generation.usage.body())
    finally:
        await pieces.aclose()
