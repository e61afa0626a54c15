"""Aliases: names that stand for adapters, by weight. /v1/aliases."""

from fastapi import APIRouter, Request, Response

from adapters_store.errors import AdapterNotFound
from adapters_store.records import Alias, Target
from adapters_store.told import told_of_alias
from server.api.catalogue.actors import actor_of
from server.api.operation import operation
from server.api.protocol.adapters import AliasBody
from server.api.protocol.answers.adapters import AliasAnswer, AliasDeleted, AliasList
from server.api.protocol.schema import ADAPTER_NAME
from server.api.service import service_of
from server.api.transport.bodies import read_body
from server.api.transport.errors import respond
from server.errors import InvalidRequest

router = APIRouter()
_LED_TO = {it: {"name": "/id"} for it in ("aliases_get_one", "aliases_delete")}


@router.put(
    "/v1/aliases/{name}",
    openapi_extra=operation(
        {200: AliasAnswer, 201: AliasAnswer},
        takes=AliasBody,
        refuses=(404, 409, 507),
        path={"name": ADAPTER_NAME},
        leads_to=_LED_TO,
    ),
)
async def put(name: str, request: Request) -> Response:
    """Requests for `name` go to its targets in proportion to their weights, those of one `user` always to the same."""
    service, body = service_of(request), await read_body(request, AliasBody)
    if body.alias is not None and body.alias != name:
        raise InvalidRequest(f"the path names {name[:128]!r} and the body another alias", param="alias")
    is_new = service.catalog.alias(name) is None
    targets = tuple(Target(it.model, it.weight) for it in body.targets)
    await service.lifecycle.alias(name, targets, actor_of(request))
    return respond(201 if is_new else 200, told_of_alias(_alias(name, request)))


@router.get("/v1/aliases", openapi_extra=operation(AliasList))
async def list_all(request: Request) -> Response:
    aliases = service_of(request).catalog.aliases
    return respond(200, {"object": "list", "data": [told_of_alias(alias) for alias in aliases]})


@router.get("/v1/aliases/{name}", openapi_extra=operation(AliasAnswer, refuses=(404,)))
async def get_one(name: str, request: Request) -> Response:
    return respond(200, told_of_alias(_alias(name, request)))


@router.delete("/v1/aliases/{name}", openapi_extra=operation(AliasDeleted, refuses=(404, 409, 507)))
async def delete(name: str, request: Request) -> Response:
    await service_of(request).lifecycle.unalias(name, actor_of(request))
    return respond(200, {"id": name, "object": "alias", "deleted": True})


def _alias(name: str, request: Request) -> Alias:
    alias = service_of(request).catalog.alias(name)
    if alias is None:
        raise AdapterNotFound(name)
    return alias
