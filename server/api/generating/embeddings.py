"""POST /v1/embeddings: hidden states of prompts, pooled. Nothing is generated; a request's way is that of a completion
(completions.py) otherwise."""

import asyncio
import base64

import msgspec
import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray

from server.api.generating.generation import Generation
from server.api.generating.planned import Prompts, in_words_of_the_route, planned
from server.api.operation import operation
from server.api.protocol.answers.generation import Embeddings
from server.api.protocol.embeddings import EmbeddingBody
from server.api.protocol.wanted import Wanted
from server.api.service import Service, service_of
from server.api.transport.bodies import read_body
from server.api.transport.errors import respond
from server.api.transport.sse import unless_client_leaves
from server.engine.request import OfPrompt
from server.errors import GenerationFailed, InvalidRequest
from server.lifecycle.models import Meant

router = APIRouter()
_NAMES = {"prompt": "input", "messages": "input"}
Vector = NDArray[np.float32]
LITTLE_ENDIAN = np.dtype("<f4")  # as the engine sends vectors, and as OpenAI's clients read them


@router.post("/v1/embeddings", openapi_extra=operation(Embeddings, takes=EmbeddingBody, refuses=(404, 422, 429, 504)))
async def embeddings(request: Request) -> Response:
    service, body = service_of(request), await read_body(request, EmbeddingBody)
    meant = service.meaning_of(body.model, body.who)
    _check_dimensions(body, service)
    prompts = Prompts(body.input, "input", body.add_special_tokens is not False)
    with in_words_of_the_route(_NAMES):
        async with planned(request, wanted(body, meant), prompts) as generation:
            return respond(200, await unless_client_leaves(request, _answer(generation, body)))


def wanted(body: EmbeddingBody, meant: Meant) -> Wanted:
    return Wanted(
        meant,
        max_tokens=0,
        of_prompt=OfPrompt(pooling=body.pooling or "mean"),
        priority=body.priority or 0,
        timeout_s=body.timeout,
        cache_salt=body.cache_salt or "",
    )


def _check_dimensions(body: EmbeddingBody, service: Service) -> None:
    size = service.info.hidden_size
    if body.dimensions is not None and body.dimensions != size:
        raise InvalidRequest(
            f"dimensions is {body.dimensions}, and this model's vectors have {size}; a part of one would mean nothing, "
            "since the model was not trained so that it would",
            param="dimensions",
            code="unsupported_parameter",
        )


async def _answer(generation: Generation, body: EmbeddingBody) -> dict[str, object]:
    told: list[dict[str, object]] = []
    for index, it in enumerate(await generation.completed()):
        vector = it.of_prompt.vector if it.of_prompt is not None else None
        if vector is None:
            raise GenerationFailed("the engine has told nothing of a prompt")
        told.append({"object": "embedding", "index": index, "embedding": worded(vector, body)})
        await asyncio.sleep(0)  # a hundred thousand numbers are some time's work
    tokens = generation.usage.prompt_tokens
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": told, "model": generation.wanted.meant.model, "usage": usage}


def worded(raw: bytes, body: EmbeddingBody) -> str | msgspec.Raw:
    """[hidden size] float32 as the request wants it. Raises GenerationFailed for what is no number: JSON has no word
    for it."""
    vector = np.frombuffer(raw, LITTLE_ENDIAN)
    if not np.isfinite(vector).all():
        raise GenerationFailed("the model's hidden states are beyond what its numbers can hold")
    if body.normalize is not False:
        vector = normalized(vector)
    if body.encoding_format == "base64":
        return base64.b64encode(vector.tobytes()).decode()
    return msgspec.Raw(msgspec.json.encode(vector.tolist()))


def normalized(vector: Vector) -> Vector:
    """Of length 1; a vector of zeros has no direction, and stays as it is."""
    wide = vector.astype(np.float64)  # squares of large numbers would be beyond float32
    length = np.sqrt(np.dot(wide, wide))
    return (wide / length if length else wide).astype(LITTLE_ENDIAN)
