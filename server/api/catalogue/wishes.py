"""From a request to a wish: which name shall mean which files, and with what manifest.

The files lie in a directory of the server, were uploaded before, come with this very request as a form, or are fetched
from a place that the operator allows.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from fastapi import Request

from adapters_store.errors import UploadNotFound
from adapters_store.manifest import parse_manifest
from adapters_store.sources.fetcher import FetcherBusy, FetcherClosed
from server.api.catalogue.forms import receive_multipart
from server.api.catalogue.uploads import overload_is_told
from server.api.protocol.adapters import AdapterBody
from server.api.service import Service
from server.api.transport.bodies import parse, read_body, validated
from server.api.transport.sse import unless_client_leaves
from server.errors import InvalidRequest, Overloaded, ShuttingDown
from server.lifecycle.wish import Wish, own_directory, source_path

_PLACES = ("path", "upload", "source")


@asynccontextmanager
async def wish_of(request: Request, service: Service, name: str | None = None) -> AsyncIterator[Wish]:
    """What the request asks for; `name` where its path says it. What came with it or was fetched for it is gone at the
    end; an upload that was made before is gone if all went well, else it can be mended and named again."""
    async with AsyncExitStack() as leaving:
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            form = await receive_multipart(request, service.uploads)
            leaving.push_async_callback(_delete, service, form.upload_id)
            body = _body_of(form.fields, form.upload_id, service)
        else:
            body = await read_body(request, AdapterBody)
        wanted = _name(body, name)
        service.catalog.check_name(wanted)
        root, job = None, None
        if body.path is not None:
            job = source_path(service.lifecycle.inspection.rules, body.path, body.ignore_keys)
        else:
            upload_id, root = body.upload or "", "upload"
            if body.source is not None:
                upload_id, root = await unless_client_leaves(request, _fetched(body.source, service))
                leaving.push_async_callback(_delete, service, upload_id)
            job = own_directory(
                service.lifecycle.inspection.rules, await service.uploads.path(upload_id), body.ignore_keys
            )
        manifest = None if body.manifest is None else parse_manifest(body.manifest, "manifest")
        yield Wish(wanted, job, manifest, body.verify, root=root)
        if body.upload is not None:
            await _delete(service, body.upload)


def _name(body: AdapterBody, name: str | None) -> str:
    given = [place for place in _PLACES if getattr(body, place) is not None]
    if len(given) != 1:
        told = f"{' and '.join(given)} are given" if given else "none is given"
        raise InvalidRequest(
            f"one of {', '.join(_PLACES)} says where the adapter is; {told}", param="path", code="invalid_value"
        )
    if name is not None and body.name is not None and body.name != name:
        raise InvalidRequest(f"the path names {name[:128]!r} and the body another adapter", param="name")
    wanted = body.name if name is None else name
    if wanted is None:
        raise InvalidRequest("name: Field required", param="name", code="invalid_value")
    return wanted


def _body_of(fields: Mapping[str, str], upload_id: str, service: Service) -> AdapterBody:
    """The fields of a form are texts: of these, all but the name hold JSON."""
    given: dict[str, Any] = {"upload": upload_id}
    for field, value in fields.items():
        given[field] = value if field == "name" else _json(field, value)
    return validated(AdapterBody, given, service.body_limits)


def _json(field: str, value: str) -> Any:
    parsed = parse(b'{"value":%s}' % value.encode())
    if len(parsed) != 1:
        raise InvalidRequest(f"{field} holds more than one value", param=field, code="invalid_value")
    return parsed["value"]


async def _fetched(source: str, service: Service) -> tuple[str, str]:
    """The upload that it is in now, and where it came from, exactly."""
    try:
        with overload_is_told():
            upload_id, fetched = await service.fetcher.fetch_as_upload(source, service.uploads)
    except FetcherBusy:
        raise Overloaded("as many adapters wait to be fetched as may; try again later") from None
    except FetcherClosed:
        raise ShuttingDown from None
    return upload_id, f"{source.partition(':')[0]}:{fetched.resolved}"


async def _delete(service: Service, upload_id: str) -> None:
    with suppress(UploadNotFound):
        await service.uploads.delete(upload_id)
