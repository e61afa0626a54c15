"""POST /v1/responses, without stored state. See completions.py for a request's way."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from server.api.generating.generation import Generation
from server.api.generating.planned import in_words_of_the_route, planned
from server.api.generating.response_events import ResponseEvents, streamed
from server.api.generating.response_items import ResponseShape
from server.api.operation import operation
from server.api.operation import streamed as streamed_as
from server.api.protocol.answers.responses import InputTokensAnswer, ResponseAnswer, ResponseEvent
from server.api.protocol.responses import ResponseBody
from server.api.service import service_of
from server.api.texts.chat_template import Conversation
from server.api.transport.bodies import read_body
from server.api.transport.errors import respond
from server.api.transport.sse import Ending, event_stream, unless_client_leaves
from server.errors import NotFound

router = APIRouter()
_NOT_STORED = operation({}, refuses=(404,))
# for what the core calls by chat's names
_NAMES = {"messages": "input", "prompt": "input", "max_tokens": "max_output_tokens", "reasoning_effort": "reasoning",
          "thinking": "reasoning"}  # fmt: skip


@router.post(
    "/v1/responses",
    openapi_extra=operation(
        {200: streamed_as(ResponseAnswer, ResponseEvent, ending=None)}, takes=ResponseBody, refuses=(404, 422, 429, 504)
    ),
)
async def create_response(request: Request) -> Response:
    body = await read_body(request, ResponseBody)
    async with _planned(request, body) as generation:
        shape = ResponseShape(body, generation, service_of(request).text.token_texts)
        if body.stream:
            events = ResponseEvents()
            return await event_stream(request, streamed(generation, shape, events), Ending(b"", events.failed))
        return respond(200, await unless_client_leaves(request, _whole(generation, shape)))


@router.post(
    "/v1/responses/input_tokens",
    openapi_extra=operation(InputTokensAnswer, takes=ResponseBody, refuses=(404, 422, 429)),
)
async def input_tokens(request: Request) -> Response:
    """How many a response to this body would begin with. What a response would be refused for, this is."""
    async with _planned(request, await read_body(request, ResponseBody)) as generation:
        return respond(200, {"object": "response.input_tokens", "input_tokens": len(generation.prompts[0])})


@router.api_route("/v1/responses/{response_id}", methods=["GET", "DELETE"], openapi_extra=_NOT_STORED)
@router.get("/v1/responses/{response_id}/input_items", name="input_items", openapi_extra=_NOT_STORED)
@router.post("/v1/responses/{response_id}/cancel", name="cancel", openapi_extra=_NOT_STORED)
async def stored_response(response_id: str) -> Response:
    raise NotFound(
        f"responses are not stored, so there is no {response_id[:100]!r}; keep the answer of POST /v1/responses",
        param="response_id",
        code="response_not_found",
    )


@asynccontextmanager
async def _planned(request: Request, body: ResponseBody) -> AsyncIterator[Generation]:
    meant = service_of(request).meaning_of(body.model, body.who)
    wanted = body.sampled(meant, body.max_output_tokens, (body.top_logprobs or 0) if body.tells_logprobs else None)
    with in_words_of_the_route(_NAMES):
        async with planned(request, replace(wanted, tools=body.tools_wanted), conversation(body)) as generation:
            yield generation


async def _whole(generation: Generation, shape: ResponseShape) -> dict[str, object]:
    async for piece in generation.pieces():
        for step in shape.parts.take(piece) if piece is not None else ():
            await shape.tell(step.part, step.tokens)
    return shape.ended(generation.usage)


def conversation(body: ResponseBody) -> Conversation:
    effort = None if body.reasoning is None else body.reasoning.effort
    variables = {} if effort is None else {"reasoning_effort": effort}
    tools = () if body.tools_wanted is None else body.tools_wanted.tools
    thinks = False if effort == "none" else None
    return Conversation(body.said, variables, tools=tools, thinks=thinks, may_lose_reasoning=True)
