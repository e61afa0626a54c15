"""Adapters that come over HTTP: POST /v1/uploads, then its files, whole (PUT) or from where they ended (PATCH)."""

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from adapters_store.file_names import check_file_name
from adapters_store.upload_files import TooManyUploads, Upload
from adapters_store.uploads import Uploads
from server.api.operation import BYTES, JSON, Answered, Content, operation
from server.api.protocol.answers.adapters import UploadAnswer, UploadDeleted
from server.api.protocol.schema import FILE_NAME
from server.api.service import service_of
from server.api.transport.cors import refuse_other_sites
from server.api.transport.errors import respond
from server.errors import ClientLeft, InvalidRequest, Overloaded

router = APIRouter()
_FILE_TYPES = ("", "application/octet-stream", "application/json")
_OF_ITS_ID = ("uploads_get", "uploads_delete", "uploads_offset", "uploads_replace", "uploads_append")
_LED_TO = {it: {"upload_id": "/id"} for it in _OF_ITS_ID}
_FILE_NAME = {"name": FILE_NAME}
_COME = Answered(headers=("Upload-Offset",))
_BYTES: Content = {BYTES: {}, JSON: {}}
_OFFSET = {"required": True, "type": "string", "pattern": "^[0-9]{1,18}$", "description": "where this piece begins"}
_FILE = "/v1/uploads/{upload_id}/files/{name}"


@router.post("/v1/uploads", openapi_extra=operation({201: UploadAnswer}, refuses=(507,), leads_to=_LED_TO))
async def create(request: Request) -> Response:
    refuse_other_sites(request)
    with overload_is_told():
        upload = await uploads_of(request).create()
    return respond(201, _told(upload, request))


@router.get("/v1/uploads/{upload_id}", openapi_extra=operation(UploadAnswer, refuses=(404,)))
async def get(upload_id: str, request: Request) -> Response:
    return respond(200, _told(await uploads_of(request).get(upload_id), request))


@router.delete("/v1/uploads/{upload_id}", openapi_extra=operation(UploadDeleted, refuses=(404, 409)))
async def delete(upload_id: str, request: Request) -> Response:
    await uploads_of(request).delete(upload_id)
    return respond(200, {"id": upload_id, "object": "adapter.upload", "deleted": True})


@router.head(_FILE, openapi_extra=operation({200: _COME}, refuses=(404, 422), path=_FILE_NAME))
async def offset(upload_id: str, name: str, request: Request) -> Response:
    """How far the file has come; 0 if nothing of it is there."""
    check_file_name(name)
    upload = await uploads_of(request).get(upload_id)
    return Response(headers={"Upload-Offset": str(upload.files.get(name, 0)), "Cache-Control": "no-store"})


@router.put(
    _FILE,
    openapi_extra=operation(
        {204: _COME}, takes=_BYTES, may_be_empty=True, path=_FILE_NAME, refuses=(404, 409, 422, 507)
    ),
)
async def replace(upload_id: str, name: str, request: Request) -> Response:
    """The whole file, in place of what was there. If the client leaves, what has arrived is kept."""
    _check_type(request)
    with overload_is_told():
        size = await uploads_of(request).replace(upload_id, name, pieces_of(request))
    return Response(status_code=204, headers={"Upload-Offset": str(size)})


@router.patch(
    _FILE,
    openapi_extra=operation(
        {204: _COME},
        takes=_BYTES,
        may_be_empty=True,
        path=_FILE_NAME,
        refuses=(404, 409, 422, 507),
        headers={"Upload-Offset": _OFFSET},
    ),
)
async def append(upload_id: str, name: str, request: Request) -> Response:
    """The file from `Upload-Offset` on, which is where it ends."""
    _check_type(request)
    with overload_is_told():
        size = await uploads_of(request).append(upload_id, name, _offset_of(request), pieces_of(request))
    return Response(status_code=204, headers={"Upload-Offset": str(size)})


def uploads_of(request: Request) -> Uploads:
    return service_of(request).uploads


async def pieces_of(request: Request) -> AsyncIterator[bytes]:
    """The body as it arrives. Raises ClientLeft if it does not come to its end."""
    try:
        async for piece in request.stream():
            yield piece
    except ClientDisconnect:
        raise ClientLeft from None


@contextmanager
def overload_is_told() -> Iterator[None]:
    try:
        yield
    except TooManyUploads as error:
        raise Overloaded(str(error)) from None


def _check_type(request: Request) -> None:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in _FILE_TYPES:
        raise InvalidRequest(
            "the body must be the file's bytes, sent with Content-Type: application/octet-stream", code="invalid_body"
        )


def _offset_of(request: Request) -> int:
    text = request.headers.get("upload-offset", "")
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InvalidRequest(
            "Upload-Offset must say at which byte this piece begins", param="Upload-Offset", code="invalid_value"
        )
    return int(text)


def _told(upload: Upload, request: Request) -> dict[str, object]:
    limits = uploads_of(request).limits
    return {
        "id": upload.id,
        "object": "adapter.upload",
        "files": upload.files,
        "bytes": upload.num_bytes,
        "max_bytes": limits.max_upload_bytes,
        "max_files": limits.max_files,
        "expires_at": int(upload.changed + limits.idle_s),
    }
