"""What looks after the store: /v1/store."""

from fastapi import APIRouter, Request, Response

from server.api.catalogue.actors import actor_of
from server.api.operation import operation
from server.api.protocol.answers.adapters import Collected, StoreLog
from server.api.service import service_of
from server.api.transport.bodies import check_query, count
from server.api.transport.cors import refuse_other_sites
from server.api.transport.errors import respond

router = APIRouter()
LINES, MOST_LINES, MOST_AFTER = 100, 1000, 2**63 - 1


@router.post("/v1/store/gc", openapi_extra=operation(Collected, refuses=(507,)))
async def collect(request: Request) -> Response:
    """Of what names meant before, keep the last few, and remove what nothing speaks of."""
    refuse_other_sites(request)
    check_query(request)
    num_gone, freed = await service_of(request).lifecycle.collect(actor_of(request))
    return respond(200, {"object": "gc", "revisions": num_gone, "disk_bytes": freed})


@router.get(
    "/v1/store/log",
    openapi_extra=operation(
        StoreLog,
        query={
            "after": {"type": "integer", "minimum": 0, "maximum": MOST_AFTER},
            "limit": {"type": "integer", "minimum": 1, "maximum": MOST_LINES},
        },
    ),
)
async def log(request: Request) -> Response:
    """Who changed what, in order, from behind the line `after`."""
    check_query(request, "after", "limit")
    after = count(request, "after", 0, 0, MOST_AFTER)
    limit = count(request, "limit", LINES, 1, MOST_LINES)
    lines = service_of(request).lifecycle.registry.store.log(after, limit + 1)
    return respond(200, {"object": "list", "data": lines[:limit], "has_more": len(lines) > limit})
