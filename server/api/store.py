"""What looks after the store: /v1/store."""

from fastapi import APIRouter, Request, Response

from server.api.actors import actor_of
from server.api.bodies import check_query, count
from server.api.errors import respond
from server.api.service import service_of

router = APIRouter()
LINES, MOST_LINES = 100, 1000


@router.post("/v1/store/gc")
async def collect(request: Request) -> Response:
    """Of what names meant before, keep the last few, and remove what nothing speaks of."""
    check_query(request)
    num_gone, freed = await service_of(request).lifecycle.collect(actor_of(request))
    return respond(200, {"object": "gc", "revisions": num_gone, "disk_bytes": freed})


@router.get("/v1/store/log")
async def log(request: Request) -> Response:
    """Who changed what, in order, from behind the line `after`."""
    check_query(request, "after", "limit")
    after = count(request, "after", 0, 0, 2**63 - 1)
    limit = count(request, "limit", LINES, 1, MOST_LINES)
    lines = service_of(request).lifecycle.registry.store.log(after, limit + 1)
    return respond(200, {"object": "list", "data": lines[:limit], "has_more": len(lines) > limit})
