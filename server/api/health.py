"""What probes and load balancers ask, and GET /metrics. All is answered out of this process: nothing waits for the
engine."""

from fastapi import APIRouter, Request, Response

from server.api.operation import TEXT, Answered, operation
from server.api.protocol.answers.around import Health, Unhealthy, Version
from server.api.service import Service, service_of
from server.api.transport.errors import respond
from server.errors import HeddleError
from server.metrics import CONTENT_TYPE
from server.version import VERSION

router = APIRouter()
_PROBE = operation({200: Health, 503: Unhealthy})


@router.api_route("/health", methods=["GET", "HEAD"], openapi_extra=_PROBE)
async def health(request: Request) -> Response:
    """200 while the engine lives and speaks, else 503 with the reason."""
    service = service_of(request)
    if service.is_draining and service.client.death is None:
        return respond(503, {"status": "shutting_down"})
    return _life(service)


@router.api_route("/ping", methods=["GET", "HEAD", "POST"], openapi_extra=_PROBE)
async def ping(request: Request) -> Response:
    """As /health, where vLLM's deployments ask."""
    return await health(request)


@router.api_route("/live", methods=["GET", "HEAD"], openapi_extra=_PROBE)
async def live(request: Request) -> Response:
    """200 unless starting the server again would help: the engine is dead, or silent beyond its limit. So a server that
    is shutting down is alive."""
    return _life(service_of(request))


@router.api_route("/ready", methods=["GET", "HEAD"], openapi_extra=_PROBE)
async def ready(request: Request) -> Response:
    """200 if a request for one completion would be taken now, else 503 with the reason."""
    try:
        service_of(request).admit(1).end()
    except HeddleError as refusal:
        return respond(503, {"status": refusal.code, "reason": refusal.message}, {"Retry-After": "1"})
    return respond(200, {"status": "ok"})


@router.get("/version", openapi_extra=operation(Version))
async def version(request: Request) -> Response:
    return respond(200, {"version": VERSION})


@router.get("/metrics", openapi_extra=operation({200: Answered({TEXT: {"type": "string"}})}))
async def metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.exposed(), media_type=CONTENT_TYPE)


def _life(service: Service) -> Response:
    """Of the engine."""
    if service.client.death is not None:
        return respond(503, {"status": "engine_dead", "reason": service.client.death})
    if service.is_silent:
        reason = f"the engine has said nothing for {service.client.silence_s:.0f} s"
        return respond(503, {"status": "engine_silent", "reason": reason})
    return respond(200, {"status": "ok"})
