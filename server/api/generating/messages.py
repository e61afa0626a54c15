"""POST /v1/messages and /v1/messages/count_tokens, in Anthropic's shape. See completions.py for a request's way."""

from fastapi import APIRouter, Request, Response

from server.api.generating.message_answers import MessageShape, streamed, whole
from server.api.generating.planned import in_words_of_the_route, planned
from server.api.operation import operation
from server.api.operation import streamed as streamed_as
from server.api.protocol.answers.messages import MessageAnswer, MessageErrorAnswer, MessageEvent, TokenCount
from server.api.protocol.messages import MessageBody, PromptBody
from server.api.protocol.wanted import Wanted
from server.api.service import service_of
from server.api.texts.chat_template import Conversation
from server.api.transport.bodies import read_body
from server.api.transport.errors import respond
from server.api.transport.message_errors import request_id, worded
from server.api.transport.sse import Ending, event_stream, named, unless_client_leaves
from server.lifecycle.models import Meant

router = APIRouter()
_NAMES = {"reasoning_effort": "output_config"}  # for what the core calls by chat's names


@router.post(
    "/v1/messages",
    openapi_extra=operation(
        {200: streamed_as(MessageAnswer, MessageEvent, ending=None, error=MessageErrorAnswer)},
        takes=MessageBody,
        refuses=(404, 422, 429, 504),
        refusal=MessageErrorAnswer,
    ),
)
async def create_message(request: Request) -> Response:
    service, body = service_of(request), await read_body(request, MessageBody)
    meant = service.meaning_of(body.model, body.who)
    with in_words_of_the_route(_NAMES):
        async with planned(request, wanted(body, meant), conversation(body)) as generation:
            shape = MessageShape(generation, body.stop_sequences or ())
            if body.stream:
                response: Response = await event_stream(request, streamed(generation, shape), _ending(request))
            else:
                response = respond(200, await unless_client_leaves(request, whole(generation, shape)))
    response.headers["request-id"] = request_id(request.scope)
    return response


@router.post(
    "/v1/messages/count_tokens",
    openapi_extra=operation(TokenCount, takes=PromptBody, refuses=(404, 422), refusal=MessageErrorAnswer),
)
async def count_tokens(request: Request) -> Response:
    service, body = service_of(request), await read_body(request, PromptBody)
    meant = service.meaning_of(body.model)
    with in_words_of_the_route(_NAMES):
        encoding = service.encode_chat(conversation(body), meant.manifest.chat_template)
        prompt = await unless_client_leaves(request, encoding)
    return respond(200, {"input_tokens": len(prompt)}, {"request-id": request_id(request.scope)})


def conversation(body: PromptBody) -> Conversation:
    """A turn of the model's own that has begun already is continued."""
    continues = body.continues_last_turn
    return Conversation(
        body.said,
        {} if body.effort is None else {"reasoning_effort": body.effort},
        asks_for_answer=not continues,
        continues_last_turn=continues,
        tools=() if body.tools_wanted is None else body.tools_wanted.tools,
        thinks=body.thinks,
        may_lose_reasoning=True,
    )


def wanted(body: MessageBody, meant: Meant) -> Wanted:
    return Wanted(meant, body.max_tokens, body.temperature, body.top_p, body.top_k, stops=body.stop_sequences,
                  source=body.source, tools=body.tools_wanted)  # fmt: skip


def _ending(request: Request) -> Ending:
    return Ending(b"", lambda body: named("error", worded(body, request_id(request.scope))))
