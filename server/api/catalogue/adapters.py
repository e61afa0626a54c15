"""Adapters while others decode: /v1/adapters. What happens to them is told in server/lifecycle/lifecycle.py."""

import re
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response

from adapters_store.catalog import Found
from adapters_store.told import told_of
from server.api.catalogue.actors import actor_of
from server.api.catalogue.forms import form_schema
from server.api.catalogue.wishes import wish_of
from server.api.operation import FORM, JSON, Content, operation
from server.api.protocol.adapters import AdapterBody, RollbackBody
from server.api.protocol.answers.adapters import AdapterAnswer, AdapterDeleted, AdapterDescribed, AdapterList
from server.api.protocol.schema import ADAPTER_NAME
from server.api.service import Service, service_of
from server.api.transport.bodies import check_query, count, number, read_body, text
from server.api.transport.cors import refuse_other_sites
from server.api.transport.errors import respond
from server.api.transport.sse import unless_client_leaves
from server.errors import InvalidRequest
from server.lifecycle.lifecycle import Settled

router = APIRouter()
LISTED, MOST_LISTED = 100, 1000
_REVISION = re.compile(r"[0-9a-f]{4,64}")
MOST_DRAIN_S = 86_400.0
_IF_MATCH = {
    "type": "string",
    "pattern": '^[" ]*[0-9a-f]{4,64}[" ]*$',
    "description": "the revision that is to be replaced, or its first digits",
}
_OF_ITS_NAME = ("adapters_get_one", "adapters_delete", "adapters_roll_back", "adapters_check")
_LED_TO = {it: {"name": "/id"} for it in _OF_ITS_NAME}
_NAMED = {"name": ADAPTER_NAME}
_WISH: Content = {JSON: AdapterBody, FORM: form_schema()}


@router.post(
    "/v1/adapters",
    openapi_extra=operation(
        {200: AdapterAnswer, 201: AdapterAnswer}, takes=_WISH, refuses=(404, 409, 422, 502, 507), leads_to=_LED_TO
    ),
)
async def add(request: Request) -> Response:
    """Verify the adapter and give it a name: 201, or 200 if the name already meant these very weights.

    Its weights travel to the device when a request first asks for it.
    """
    service = service_of(request)
    async with wish_of(request, service) as wish:
        settled = await unless_client_leaves(request, service.lifecycle.register(wish, actor_of(request)))
    return _settled(settled, service)


@router.put(
    "/v1/adapters/{name}",
    openapi_extra=operation(
        {200: AdapterAnswer, 201: AdapterAnswer},
        takes=_WISH,
        refuses=(404, 409, 412, 422, 502, 507),
        path=_NAMED,
        leads_to=_LED_TO,
        headers={"If-Match": _IF_MATCH},
    ),
)
async def replace(name: str, request: Request) -> Response:
    """The name means these weights from now on: 200, or 201 if it meant nothing."""
    service = service_of(request)
    expected = _expected(request)
    async with wish_of(request, service, name) as wish:
        settled = await unless_client_leaves(request, service.lifecycle.replace(wish, actor_of(request), expected))
    return _settled(settled, service)


@router.post(
    "/v1/adapters/{name}/rollback",
    openapi_extra=operation(AdapterAnswer, takes=RollbackBody, may_be_empty=True, refuses=(404, 409, 422, 507)),
)
async def roll_back(name: str, request: Request) -> Response:
    """The name means again what it meant before, or the `revision` that begins so."""
    refuse_other_sites(request)
    service, body = service_of(request), await read_body(request, RollbackBody, may_be_empty=True)
    found = await service.lifecycle.roll_back(name, body.revision, actor_of(request))
    return respond(200, _adapter(found, service))


@router.post("/v1/adapters/{name}/verify", openapi_extra=operation(AdapterAnswer, refuses=(404, 422, 507)))
async def check(name: str, request: Request) -> Response:
    """Read every byte that is kept of it, and compare its logits with those of merged weights."""
    refuse_other_sites(request)
    service = service_of(request)
    found = await unless_client_leaves(request, service.lifecycle.check(name, actor_of(request)))
    return respond(200, _adapter(found, service))


@router.get(
    "/v1/adapters",
    openapi_extra=operation(
        AdapterList,
        leads_to={"adapters_get_one": {"name": "/data/0/id"}},
        query={"limit": {"type": "integer", "minimum": 1, "maximum": MOST_LISTED}, "after": {"type": "string"}},
    ),
)
async def list_some(request: Request) -> Response:
    """In order of name, at most `limit`, from behind the name `after`."""
    service = service_of(request)
    check_query(request, "limit", "after")
    limit = count(request, "limit", LISTED, 1, MOST_LISTED)
    page = service.catalog.page(text(request, "after"), limit + 1)
    data = [_adapter(service.catalog.find(record.name), service) for record in page[:limit]]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    listed = {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": len(page) > limit}
    return respond(200, listed | {"total": len(service.catalog)})


@router.get("/v1/adapters/{name}", openapi_extra=operation(AdapterDescribed, refuses=(404,)))
async def get_one(name: str, request: Request) -> Response:
    """With what is bound. `name` may be name@revision."""
    service = service_of(request)
    found = service.catalog.find(name)
    own = msgspec.json.encode(_adapter(found, service))
    described = (await service.lifecycle.registry.content(found.ref.revision)).description
    return Response(own[:-1] + b"," + described[1:], media_type="application/json")  # a large one is not parsed again


@router.delete(
    "/v1/adapters/{name}",
    openapi_extra=operation(
        AdapterDeleted,
        refuses=(404, 409, 507),
        query={"drain_s": {"type": "number", "minimum": 0, "maximum": MOST_DRAIN_S}},
    ),
)
async def delete(name: str, request: Request) -> Response:
    """New requests no longer find it. Answers when those under way have ended, for which `drain_s` gives them time."""
    service = service_of(request)
    check_query(request, "drain_s")
    drain_s = number(request, "drain_s", None, 0, MOST_DRAIN_S)
    freed = await service.lifecycle.delete(name, actor_of(request), drain_s)
    told = {"device_bytes": freed.device_bytes, "disk_bytes": freed.disk_bytes}
    return respond(200, {"id": name, "object": "adapter", "deleted": True, "freed": told})


def _expected(request: Request) -> str | None:
    """The revision that If-Match names, or its first digits. One that says nothing would replace whatever is there."""
    given = request.headers.get("if-match")
    if given is None:
        return None
    expected = given.strip('" ')
    if not _REVISION.fullmatch(expected):
        raise InvalidRequest(
            "If-Match must name the revision that is to be replaced, by 4 digits or more", param="If-Match",
            code="invalid_value",
        )  # fmt: skip
    return expected


def _settled(settled: Settled, service: Service) -> Response:
    told = _adapter(settled.found, service) | {"notes": list(settled.notes)}
    return respond(201 if settled.is_new else 200, told)


def _adapter(found: Found, service: Service) -> dict[str, Any]:
    place = service.client.on_device.of(found.ref)
    return told_of(found, service.catalog.base_name) | {
        "durable": found.record.is_durable and service.lifecycle.registry.is_durable,
        "warnings": service.lifecycle.inspection.warnings_for(found),
        "device": {
            "state": place.tier.value,
            "bytes": place.bytes,
            "host_bytes": place.host_bytes,
            "running_requests": service.client.num_requests_of(found.ref),
        },
    }
