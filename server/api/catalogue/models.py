"""GET /v1/models: the base, every adapter with the base as its parent, and the aliases."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse

from adapters_store.records import Alias, Record
from server.api.operation import operation
from server.api.protocol.answers.around import Model, ModelList
from server.api.service import Service, service_of
from server.api.transport.errors import respond

router = APIRouter()


_AT_ONCE = 500  # entries that are made before others have their turn


@router.get("/v1/models", openapi_extra=operation(ModelList, leads_to={"models_get_model": {"model": "/data/0/id"}}))
async def list_models(request: Request) -> Response:
    """All of them, as OpenAI's clients expect, in pieces: there may be a hundred thousand."""
    service = service_of(request)

    async def entries() -> AsyncIterator[bytes]:
        yield b'{"object":"list","data":[' + _encode(_base(service))
        records = [*service.catalog, *service.catalog.aliases]
        for start in range(0, len(records), _AT_ONCE):
            told = (_told(record, service) for record in records[start : start + _AT_ONCE])
            yield b"".join(b"," + _encode(it) for it in told)
            await asyncio.sleep(0)
        yield b"]}"

    return StreamingResponse(entries(), media_type="application/json")


@router.get("/v1/models/{model:path}", openapi_extra=operation(Model, refuses=(404, 422)))
async def get_model(model: str, request: Request) -> Response:
    service = service_of(request)
    if model == service.catalog.base_name:
        return respond(200, _base(service))
    alias = service.catalog.alias(model)
    if alias is not None:
        return respond(200, _told(alias, service))
    meant = service.meaning_of(model)
    return respond(200, _told(service.catalog.get(meant.label), service) | {"id": model})


def _encode(told: dict[str, object]) -> bytes:
    return msgspec.json.encode(told)


def _base(service: Service) -> dict[str, object]:
    name = service.catalog.base_name
    return {"id": name, "object": "model", "created": service.started, "owned_by": "heddle", "root": name,
            "parent": None, "max_model_len": service.info.max_model_len}  # fmt: skip


def _told(it: Record | Alias, service: Service) -> dict[str, object]:
    root = it.current.root if isinstance(it, Record) else ", ".join(target.model for target in it.targets)
    return {"id": it.name, "object": "model", "created": it.created, "owned_by": "heddle",
            "root": root, "parent": service.catalog.base_name,
            "max_model_len": service.info.max_model_len}  # fmt: skip
