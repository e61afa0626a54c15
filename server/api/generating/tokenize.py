"""POST /tokenize and POST /detokenize: what the model would read, token by token, without asking the engine."""

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from server.api.operation import operation
from server.api.protocol.answers.generation import Prompt, Tokens
from server.api.protocol.tokens import DetokenizeBody, TokenizeBody
from server.api.service import Service, service_of
from server.api.texts.chat_template import Conversation
from server.api.transport.bodies import read_body
from server.api.transport.errors import respond
from server.api.transport.sse import unless_client_leaves

router = APIRouter()


@router.post("/tokenize", openapi_extra=operation(Tokens, takes=TokenizeBody, refuses=(404, 422)))
async def tokenize(request: Request) -> Response:
    """The tokens that a completion or a chat of the same `model` would begin with."""
    service, body = service_of(request), await read_body(request, TokenizeBody)
    tokens = await unless_client_leaves(request, _tokens_of(body, service))
    words = await unless_client_leaves(request, service.words(tokens)) if body.return_token_strs else None
    told = {"count": len(tokens), "max_model_len": service.info.max_model_len, "tokens": tokens, "token_strs": words}
    return respond(200, told)


@router.post("/detokenize", openapi_extra=operation(Prompt, takes=DetokenizeBody, refuses=(404, 422)))
async def detokenize(request: Request) -> Response:
    """The text that tokens stand for, special ones included."""
    service, body = service_of(request), await read_body(request, DetokenizeBody)
    service.meaning_of(service.catalog.base_name if body.model is None else body.model)
    return respond(200, {"prompt": await unless_client_leaves(request, service.decode(body.tokens))})


async def _tokens_of(body: TokenizeBody, service: Service) -> Sequence[int]:
    meant = service.meaning_of(service.catalog.base_name if body.model is None else body.model)
    if body.prompt is not None:
        return (await service.encode([body.prompt], "prompt", body.add_special_tokens is not False))[0]
    said = [it.said for it in body.messages or ()]
    continues = bool(body.continue_final_message)
    asks = body.add_generation_prompt is not False and not continues
    conversation = Conversation(said, body.chat_template_kwargs or {}, asks, continues, body.told_tools)
    return await service.encode_chat(conversation, meant.manifest.chat_template)
