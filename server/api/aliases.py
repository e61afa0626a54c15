"""Aliases: names that stand for adapters, by weight. /v1/aliases."""

from fastapi import APIRouter, Request, Response

from adapters_store.errors import AdapterNotFound
from adapters_store.records import Alias, Target
from adapters_store.told import told_of_alias
from server.api.actors import actor_of
from server.api.bodies import read_body
from server.api.errors import respond
from server.api.protocol import AliasBody
from server.api.service import service_of
from server.errors import InvalidRequest

router = APIRouter()


@router.put("/v1/aliases/{name}")
async def put(name: str, request: Request) -> Response:
    """Requests for `name` go to its targets in proportion to their weights, those of one `user` always to the same."""
    service, body = service_of(request), await read_body(request, AliasBody)
    if body.alias is not None and body.alias != name:
        raise InvalidRequest(f"the path names {name[:128]!r} and the body another alias", param="alias")
    is_new = service.catalog.alias(name) is None
    targets = tuple(Target(it.model, it.weight) for it in body.targets)
    await service.lifecycle.alias(name, targets, actor_of(request))
    return respond(201 if is_new else 200, told_of_alias(_alias(name, request)))


@router.get("/v1/aliases")
async def list_all(request: Request) -> Response:
    aliases = service_of(request).catalog.aliases
    return respond(200, {"object": "list", "data": [told_of_alias(alias) for alias in aliases]})


@router.get("/v1/aliases/{name}")
async def get_one(name: str, request: Request) -> Response:
    return respond(200, told_of_alias(_alias(name, request)))


@router.delete("/v1/aliases/{name}")
async def delete(name: str, request: Request) -> Response:
    await service_of(request).lifecycle.unalias(name, actor_of(request))
    return respond(200, {"id": name, "object": "alias", "deleted": True})


def _alias(name: str, request: Request) -> Alias:
    alias = service_of(request).catalog.alias(name)
    if alias is None:
        raise AdapterNotFound(name)
    return alias
