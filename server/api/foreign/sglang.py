"""As SGLang's tools ask: /load_lora_adapter and /unload_lora_adapter.

Every answer has one shape, and is 200 or 400; what is the server's fault keeps its status, so that clients try again.
"""

from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field, WithJsonSchema

from adapters_store.errors import AdapterConflict, AdapterNotFound, clean
from adapters_store.manifest import Manifest
from server.api.catalogue.actors import actor_of
from server.api.foreign.refusals import Refusal, refusing_as
from server.api.operation import operation
from server.api.protocol.answers.around import SGLangAnswer
from server.api.protocol.body import Body
from server.api.protocol.schema import ADAPTER_NAME
from server.api.service import Service, service_of
from server.api.transport.bodies import read_body
from server.api.transport.errors import respond
from server.api.transport.sse import unless_client_leaves
from server.lifecycle.wish import Wish, source_path

MOST_LISTED = 1000  # SGLang lists all; each answer would grow with the catalogue


def _answer(service: Service, status: int, error_message: str = "", name: str = "") -> Response:
    """`name` is listed wherever it stands among the others: clients look for it."""
    listed = service.catalog.page(None, MOST_LISTED)
    if name in service.catalog:
        listed.append(service.catalog.get(name))
    return respond(
        status,
        {
            "success": status == 200,
            "error_message": clean(error_message),
            "loaded_adapters": {record.name: record.current.root for record in listed},
        },
    )


def _told(request: Request, refusal: Refusal) -> Response:
    status = refusal.status if refusal.status >= 500 else 400
    return _answer(service_of(request), status, refusal.message)


router = APIRouter(route_class=refusing_as(_told))


class LoadBody(Body):
    """`lora_id` is SGLang's own: it may be there and be null."""

    lora_name: Annotated[str, Field(min_length=1), WithJsonSchema(ADAPTER_NAME)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    pinned: bool = False
    lora_id: None = None


class UnloadBody(Body):
    lora_name: Annotated[str, Field(min_length=1), WithJsonSchema(ADAPTER_NAME)]
    lora_id: None = None


@router.post(
    "/load_lora_adapter", openapi_extra=operation(SGLangAnswer, takes=LoadBody, refuses=(507,), refusal=SGLangAnswer)
)
async def load(request: Request) -> Response:
    """A free name comes to mean the adapter. `pinned` stands for the manifest that lies with it."""
    service, body = service_of(request), await read_body(request, LoadBody)
    name, manifest = body.lora_name, Manifest(pinned=True) if body.pinned else None
    if name in service.catalog:
        return _taken(service, name)
    wish = Wish(name, source_path(service.lifecycle.inspection.rules, body.lora_path), manifest)
    try:
        settled = await unless_client_leaves(request, service.lifecycle.register(wish, actor_of(request)))
    except AdapterConflict:
        if name not in service.catalog:  # it is the base's, say
            raise
        return _taken(service, name)
    return _answer(service, 200, name=name) if settled.is_changed else _taken(service, name)


@router.post(
    "/unload_lora_adapter",
    openapi_extra=operation(SGLangAnswer, takes=UnloadBody, refuses=(507,), refusal=SGLangAnswer),
)
async def unload(request: Request) -> Response:
    """New requests no longer find it. Answers when those under way have ended."""
    service, body = service_of(request), await read_body(request, UnloadBody)
    try:
        await service.lifecycle.delete(body.lora_name, actor_of(request))
    except AdapterNotFound:
        return _answer(service, 400, f"LoRA with name {body.lora_name[:200]} does not exist.")
    return _answer(service, 200)


def _taken(service: Service, name: str) -> Response:
    return _answer(service, 400, f"Failed to load LoRA adapter {name} because it is already loaded", name)
