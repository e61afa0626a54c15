"""Every error leaves in OpenAI's shape, on Anthropic's routes in theirs; this is where that is done, once."""

import logging
from collections.abc import Mapping, MutableMapping
from functools import partial
from typing import Any, cast

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from adapters_store.errors import UploadConflict
from server.api.routes import methods_of
from server.api.transport import message_errors
from server.errors import ADAPTER_ERROR_TYPE, ADAPTER_STATUS, HeddleError

log = logging.getLogger("heddle.api")
_FINAL = {"x-should-retry": "false"}
# clients ask again after any 5xx; a request that had its time would only take as long once more
_HEADERS = {503: {"Retry-After": "1"}, 504: _FINAL}
_QUARANTINED = "adapter_quarantined"  # nothing comes of asking again, whatever clients make of the status


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


def refuse(
    scope: MutableMapping[str, Any],
    status: int,
    body: Mapping[str, object],
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error body, as the clients of the request's route know errors."""
    if not message_errors.are_spoken_at(scope.get("path", "")):
        return respond(status, body, headers)
    request_id = message_errors.request_id(scope)
    return respond(
        status, message_errors.worded(body, request_id, status), {**(headers or {}), "request-id": request_id}
    )


def install(app: FastAPI) -> None:
    async def ours(request: Request, raised: Exception) -> Response:
        error = cast(HeddleError, raised)
        headers = _FINAL if error.code == _QUARANTINED else _HEADERS.get(error.status)
        return refuse(request.scope, error.status, body_of(error), headers)

    async def adapter(status: int, code: str, request: Request, error: Exception) -> Response:
        kind = ADAPTER_ERROR_TYPE.get(status, "invalid_request_error")
        headers = _FINAL if code == _QUARANTINED else None
        if isinstance(error, UploadConflict):
            headers = {"Upload-Offset": str(error.offset)}
        return refuse(request.scope, status, error_body(str(error), kind, code=code), headers)

    async def http(request: Request, raised: Exception) -> Response:
        error = cast(HTTPException, raised)
        headers = error.headers
        if error.status_code == 405:  # the framework names the methods of the first route that has the path
            headers = {"Allow": ", ".join(methods_of(request.scope["path"], request.app.routes))}
        message = {404: "there is no such route", 405: "this route does not take that method"}.get(
            error.status_code, str(error.detail)
        )
        body = error_body(message, "invalid_request_error")
        return refuse(request.scope, error.status_code, body, headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        return refuse(request.scope, 500, internal_error(request, error))

    app.add_exception_handler(HeddleError, ours)
    for kind, (status, code) in ADAPTER_STATUS.items():
        app.add_exception_handler(kind, partial(adapter, status, code))
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)
