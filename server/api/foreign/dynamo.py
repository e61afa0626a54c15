"""As NVIDIA Dynamo's tools ask: /v1/loras.

Refusals have Dynamo's shape and our own status codes: Dynamo answers 500 whatever the reason, which says "try again" of
what will never succeed.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Annotated
from urllib.parse import unquote

import msgspec
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import Field, WithJsonSchema

from adapters_store.errors import AdapterNotFound, clean
from server.api.catalogue.actors import actor_of
from server.api.foreign.refusals import Refusal, refusing_as
from server.api.operation import operation
from server.api.protocol.answers.around import DynamoAnswer, DynamoList, DynamoRefusal
from server.api.protocol.body import Body
from server.api.protocol.schema import ADAPTER_NAME
from server.api.service import service_of
from server.api.transport.bodies import read_body
from server.api.transport.errors import respond
from server.api.transport.sse import unless_client_leaves
from server.errors import InvalidRequest
from server.lifecycle.wish import Wish, source_path

_AT_ONCE = 500  # names that are listed before others have their turn


def _refused(status: int, message: str) -> Response:
    return respond(status, {"status": "error", "message": clean(message)})


def _done(name: str, what: str) -> Response:
    told = {"status": "success", "message": f"LoRA adapter '{name}' {what}", "lora_name": name}
    return respond(200, told | {"lora_id": lora_id(name)})


def _told(_: Request, refusal: Refusal) -> Response:
    return _refused(refusal.status, refusal.message)


router = APIRouter(route_class=refusing_as(_told))
_LED_TO = {"dynamo_unload": {"lora_name": "/lora_name"}}


class Source(Body):
    uri: Annotated[str, Field(min_length=1, max_length=4096, json_schema_extra={"pattern": "^file:///[^?#]*$"})]


class LoadBody(Body):
    lora_name: Annotated[str, Field(min_length=1), WithJsonSchema(ADAPTER_NAME)]
    source: Source


@router.post(
    "/v1/loras",
    openapi_extra=operation(
        DynamoAnswer, takes=LoadBody, refuses=(404, 409, 422, 507), refusal=DynamoRefusal, leads_to=_LED_TO
    ),
)
async def load(request: Request) -> Response:
    """A free name comes to mean the adapter. If it means these very weights already, nothing happens."""
    service, body = service_of(request), await read_body(request, LoadBody)
    wish = Wish(body.lora_name, source_path(service.lifecycle.inspection.rules, path_of(body.source.uri)))
    settled = await unless_client_leaves(request, service.lifecycle.register(wish, actor_of(request)))
    return _done(body.lora_name, "loaded successfully" if settled.is_changed else "already loaded")


@router.get("/v1/loras", openapi_extra=operation(DynamoList, refusal=DynamoRefusal))
async def list_all(request: Request) -> Response:
    """All of them, in pieces: there may be a hundred thousand."""
    names = [record.name for record in service_of(request).catalog]

    async def pieces() -> AsyncIterator[bytes]:
        yield b'{"status":"success","loras":{'
        for start in range(0, len(names), _AT_ONCE):
            some = names[start : start + _AT_ONCE]
            yield b"," * bool(start) + b",".join(b"%s:%d" % (msgspec.json.encode(it), lora_id(it)) for it in some)
            await asyncio.sleep(0)
        yield b'},"count":%d}' % len(names)

    return StreamingResponse(pieces(), media_type="application/json")


@router.delete(
    "/v1/loras/{lora_name:path}",
    openapi_extra=operation(DynamoAnswer, refuses=(404, 409, 422, 507), refusal=DynamoRefusal),
)
async def unload(lora_name: str, request: Request) -> Response:
    """New requests no longer find it. Answers when those under way have ended."""
    try:
        await service_of(request).lifecycle.delete(lora_name, actor_of(request))
    except AdapterNotFound:
        return _refused(404, f"LoRA adapter '{lora_name[:200]}' not found.")
    return _done(lora_name, "unloaded successfully")


def lora_id(name: str) -> int:
    """A number for tools that want one, 1 to 2**31 - 1, always the same for a name: the first four bytes of the
    SHA-256 of its UTF-8, big-endian, without the highest bit; 1 for 0. Two names may share one; nothing here asks by
    it. Dynamo's own are made with BLAKE3 and differ."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") & 0x7FFF_FFFF or 1


def path_of(uri: str) -> str:
    """The path of a file:// URI, percent-decoded. Raises InvalidRequest for any other."""
    scheme, there, rest = uri.partition("://")
    if not there:
        raise _uri_refused("source.uri must be a URI, such as file:///adapters/mine")
    if scheme.lower() != "file":
        raise _uri_refused(
            "source.uri names a remote source, and remote sources are not enabled here; give a file:// URI of a "
            "directory below an adapter root"
        )
    host, slash, path = rest.partition("/")
    if host or not slash:
        raise _uri_refused("source.uri names a host; files are read from this machine: file:///adapters/mine")
    if "?" in path or "#" in path:
        raise _uri_refused("source.uri has a query or a fragment; write ? as %3F and # as %23")
    try:
        return "/" + unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise _uri_refused("the path in source.uri is not UTF-8") from None


def _uri_refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="source", code="invalid_value")
