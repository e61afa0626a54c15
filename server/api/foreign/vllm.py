"""As vLLM's tools ask: /v1/load_lora_adapter and /v1/unload_lora_adapter.

Answers are plain text, refusals vLLM's ErrorResponse, whose `code` is the status. Clients match on the texts.
"""

from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import ConfigDict, Field, WithJsonSchema
from pydantic.config import JsonDict

from adapters_store.errors import AdapterConflict, AdapterNotFound, NoAdapterThere, clean
from server.api.catalogue.actors import actor_of
from server.api.foreign.refusals import Refusal, refusing_as
from server.api.operation import TEXT, Answered, operation
from server.api.protocol.answers.around import VLLMRefusal
from server.api.protocol.body import Body
from server.api.protocol.schema import ADAPTER_NAME
from server.api.service import service_of
from server.api.transport.bodies import read_body
from server.api.transport.errors import respond
from server.api.transport.sse import unless_client_leaves
from server.lifecycle.wish import Wish, source_path


def _refused(status: int, message: str, type: str, param: str | None = None) -> Response:
    return respond(status, {"error": {"message": clean(message), "type": type, "param": param, "code": status}})


def _told(_: Request, refusal: Refusal) -> Response:
    """vLLM knows of a client's faults only 400 and 404."""
    if refusal.status == 404:
        return _refused(404, refusal.message, "NotFoundError", refusal.param)
    if refusal.status < 500:
        return _refused(400, refusal.message, "BadRequestError", refusal.param)
    type = "ServiceUnavailableError" if refusal.status == 503 else "InternalServerError"
    return _refused(refusal.status, refusal.message, type, refusal.param)


router = APIRouter(route_class=refusing_as(_told))
_LINE = {200: Answered({TEXT: {"type": "string"}})}

# left out, they are refused in vLLM's own words
_NEEDED: JsonDict = {"minLength": 1}
Name = Annotated[str, WithJsonSchema(ADAPTER_NAME)]


class LoadBody(Body):
    """`is_3d_lora_weight` is taken and not needed: how an adapter's tensors lie is read from its files."""

    model_config = ConfigDict(json_schema_extra={"required": ["lora_name", "lora_path"]})

    lora_name: Name = ""
    lora_path: Annotated[str, Field(max_length=4096, json_schema_extra=_NEEDED)] = ""
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadBody(Body):
    """`lora_int_id` is taken and not needed, as in vLLM: names are unique."""

    model_config = ConfigDict(json_schema_extra={"required": ["lora_name"]})

    lora_name: Name = ""
    lora_int_id: int | None = None


@router.post(
    "/v1/load_lora_adapter", openapi_extra=operation(_LINE, takes=LoadBody, refuses=(404, 507), refusal=VLLMRefusal)
)
async def load(request: Request) -> Response:
    """A free name comes to mean the adapter; with `load_inplace` whatever it means."""
    service, body = service_of(request), await read_body(request, LoadBody)
    name, lifecycle = body.lora_name, service.lifecycle
    if not name or not body.lora_path:
        return _refused(400, "Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput")
    if name in service.catalog and not body.load_inplace:
        return _taken(name)
    wish, change = Wish(name, source_path(lifecycle.inspection.rules, body.lora_path)), lifecycle.register
    if body.load_inplace:
        change = lifecycle.replace
    try:
        settled = await unless_client_leaves(request, change(wish, actor_of(request)))
    except NoAdapterThere:
        missing = f"Loading lora {name} failed: No adapter found for {body.lora_path}"
        return _refused(404, missing, "NotFoundError")
    except AdapterConflict:
        if name not in service.catalog:  # it is the base's, say
            raise
        return _taken(name)
    if not settled.is_changed and not body.load_inplace:
        return _taken(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post(
    "/v1/unload_lora_adapter", openapi_extra=operation(_LINE, takes=UnloadBody, refuses=(404, 507), refusal=VLLMRefusal)
)
async def unload(request: Request) -> Response:
    """New requests no longer find it. Answers when those under way have ended."""
    service, body = service_of(request), await read_body(request, UnloadBody)
    if not body.lora_name:
        return _refused(400, "'lora_name' needs to be provided to unload a LoRA adapter.", "InvalidUserInput")
    try:
        await service.lifecycle.delete(body.lora_name, actor_of(request))
    except AdapterNotFound:
        return _refused(404, f"The lora adapter '{body.lora_name[:200]}' cannot be found.", "NotFoundError")
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _taken(name: str) -> Response:
    return _refused(
        400,
        f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
        "'load_inplace' to True.",
        "InvalidUserInput",
    )
