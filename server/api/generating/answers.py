"""What completions and chat answer with: one JSON body, or chunks of a stream."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence

import msgspec
from fastapi import Request, Response

from server.api.generating.choice import Piece
from server.api.generating.generation import Completed, Generation
from server.api.generating.told import joined, worded
from server.api.texts.decoding import TokenTexts
from server.api.transport.errors import respond
from server.api.transport.sse import OPENAI, data, event_stream, unless_client_leaves
from server.engine.request import Logprobs
from server.lifecycle.models import Meant


class Shape(ABC):
    """How one of the two routes words its answers."""

    prefix: str
    object_name: str
    chunk_name: str

    def __init__(self, meant: Meant) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = meant.model
        self.fingerprint = f"fp_{meant.ref.revision[:16]}" if meant.ref is not None else None

    @abstractmethod
    async def whole(self, completed: Sequence[Completed], generation: Generation) -> dict[str, object]:
        """The answer, without usage."""

    async def ready(self, piece: Piece) -> Sequence[Piece]:
        """Those that can be worded now, of this piece and earlier ones."""
        return (piece,)

    @abstractmethod
    def chunk_choice(self, piece: Piece, is_first: bool) -> dict[str, object]: ...

    def body(self, object_name: str, choices: Sequence[Mapping[str, object]], **more: object) -> dict[str, object]:
        return {"id": self.id, "object": object_name, "created": self.created, "model": self.model,
                "choices": choices, **more, "system_fingerprint": self.fingerprint}  # fmt: skip


async def answer(
    request: Request, generation: Generation, shape: Shape, streams: bool, include_usage: bool
) -> Response:
    if streams:
        return await event_stream(request, _chunks(generation, shape, include_usage), OPENAI)
    return respond(200, await unless_client_leaves(request, _whole(generation, shape)))


async def _whole(generation: Generation, shape: Shape) -> dict[str, object]:
    body = await shape.whole(await generation.completed(), generation)
    fingerprint = body.pop("system_fingerprint")
    return {**body, "usage": generation.usage.body(), "system_fingerprint": fingerprint}


async def _chunks(generation: Generation, shape: Shape, include_usage: bool) -> AsyncGenerator[bytes | None]:
    begun: set[int] = set()
    usage: dict[str, object] = {"usage": None} if include_usage else {}
    pieces = generation.pieces()
    try:
        async for piece in pieces:
            if piece is None:
                yield None
                continue
            for it in await shape.ready(piece):
                choice = shape.chunk_choice(it, is_first=it.index not in begun)
                begun.add(it.index)
                yield data(shape.body(shape.chunk_name, [choice], **usage))
        if include_usage:
            yield data(shape.body(shape.chunk_name, [], usage=generation.usage.body()))
    finally:
        await pieces.aclose()


async def prompt_logprobs(prompt: Sequence[int], told: Sequence[Logprobs], texts: TokenTexts) -> msgspec.Raw:
    """As vLLM words them: by token id in each place, the prompt's own token first; null for the first place."""

    def word(place: tuple[int, Logprobs]) -> bytes:
        token, it = place
        entries = {str(token): _entry(it.chosen, it.rank, texts.of(token).text)}
        for rank, (other, logprob) in enumerate(zip(it.ids, it.top, strict=True), 1):
            entries.setdefault(str(other), _entry(logprob, rank, texts.of(other).text))
        return msgspec.json.encode(entries)

    return joined([b"null", *await worded(zip(prompt[1:], told, strict=True), word)])


def _entry(logprob: float, rank: int, text: str) -> dict[str, object]:
    return {"logprob": logprob, "rank": rank, "decoded_token": text}
