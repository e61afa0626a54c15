"""Every error leaves in OpenAI's shape; this is where that is done, once."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import cast

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from adapters_store.errors import UploadConflict
from server.errors import ADAPTER_ERROR_TYPE, ADAPTER_STATUS, HeddleError

log = logging.getLogger("heddle.api")


def error_body(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    return {"error": {"message": _sound(message), "type": type, "param": param and _sound(param), "code": code}}


def _sound(text: str) -> str:
    """What was sent may hold halves of surrogate pairs, which have no bytes."""
    return text.encode(errors="replace").decode()


def body_of(error: HeddleError) -> dict[str, object]:
    return error_body(error.message, error.type, error.param, error.code)


def internal_error(request: Request, error: Exception) -> dict[str, object]:
    """Log an error that is our own fault; the client hears nothing of it but that it happened."""
    log.error("unexpected error in %s %s", request.method, request.scope["path"], exc_info=error)
    return error_body("internal error; it has been logged", "internal_error")


def respond(status: int, body: Mapping[str, object], headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def install(app: FastAPI) -> None:
    async def ours(_: Request, error: Exception) -> Response:
        return _respond_to(cast(HeddleError, error))

    async def adapter(status: int, code: str, _: Request, error: Exception) -> Response:
        kind = ADAPTER_ERROR_TYPE.get(status, "invalid_request_error")
        headers = {"Upload-Offset": str(error.offset)} if isinstance(error, UploadConflict) else None
        return respond(status, error_body(str(error), kind, code=code), headers)

    async def http(_: Request, raised: Exception) -> Response:
        error = cast(HTTPException, raised)
        message = {404: "there is no such route", 405: "this route does not take that method"}.get(
            error.status_code, str(error.detail)
        )
        body = error_body(message, "invalid_request_error")
        return respond(error.status_code, body, error.headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        return respond(500, internal_error(request, error))

    app.add_exception_handler(HeddleError, ours)
    for kind, (status, code) in ADAPTER_STATUS.items():
        app.add_exception_handler(kind, partial(adapter, status, code))
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def _respond_to(error: HeddleError) -> Response:
    return respond(error.status, body_of(error), {"Retry-After": "1"} if error.status == 503 else None)
