"""GET /health, which tells the truth about the engine, and GET /metrics."""

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from server.api.errors import respond
from server.api.service import service_of

router = APIRouter()


@router.api_route("/health", methods=["GET", "HEAD"])
async def health(request: Request) -> Response:
    """200 while the engine lives and speaks, else 503 with the reason."""
    service = service_of(request)
    if service.client.death is not None:
        return respond(503, {"status": "engine_dead", "reason": service.client.death})
    if service.is_draining:
        return respond(503, {"status": "shutting_down"})
    if service.is_silent:
        reason = f"the engine has said nothing for {service.client.silence_s:.0f} s"
        return respond(503, {"status": "engine_silent", "reason": reason})
    return respond(200, {"status": "ok"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    return Response(generate_latest(service_of(request).metrics.registry), media_type=CONTENT_TYPE_LATEST)
