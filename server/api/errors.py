"""Every error leaves in OpenAI's shape; this is where that is done, once."""

import logging
from collections.abc import Mapping
from typing import cast

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from adapters_store.errors import AdapterError
from server.errors import ADAPTER_STATUS, HeddleError

log = logging.getLogger("heddle.api")


def error_body(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, object]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def body_of(error: HeddleError) -> dict[str, object]:
    return error_body(error.message, error.type, error.param, error.code)


def respond(status: int, body: Mapping[str, object], headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def install(app: FastAPI) -> None:
    async def ours(_: Request, error: Exception) -> Response:
        return _respond_to(cast(HeddleError, error))

    async def adapter(_: Request, error: Exception) -> Response:
        status, code = ADAPTER_STATUS[type(error)]  # type: ignore[index]
        return respond(status, error_body(str(error), "invalid_request_error", code=code))

    async def validation(_: Request, error: Exception) -> Response:
        return respond(400, _validation_body(cast(RequestValidationError, error)))

    async def http(_: Request, raised: Exception) -> Response:
        error = cast(HTTPException, raised)
        if isinstance(error.__cause__, HeddleError):  # raised while FastAPI read the body
            return _respond_to(error.__cause__)
        message = {404: "there is no such route", 405: "this route does not take that method"}.get(
            error.status_code, str(error.detail)
        )
        body = error_body(message, "invalid_request_error")
        return respond(error.status_code, body, error.headers)

    async def unexpected(request: Request, error: Exception) -> Response:
        log.exception("unexpected error in %s %s", request.method, request.scope["path"], exc_info=error)
        return respond(500, error_body("internal error; it has been logged", "internal_error"))

    app.add_exception_handler(HeddleError, ours)
    for kind in ADAPTER_STATUS:
        app.add_exception_handler(kind, adapter)
    app.add_exception_handler(AdapterError, unexpected)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def _respond_to(error: HeddleError) -> Response:
    return respond(error.status, body_of(error), {"Retry-After": "1"} if error.status == 503 else None)


def _validation_body(error: RequestValidationError) -> dict[str, object]:
    """The first problem, by field, without echoing what was sent."""
    first = error.errors()[0]
    where = [str(step) for step in first["loc"] if step != "body"]
    if first["type"] in ("json_invalid", "missing") and not where[:1] or first["type"] == "json_invalid":
        return error_body("the body is not valid JSON", "invalid_request_error", code="invalid_json")
    field = where[0] if where else None
    if not where and first["type"] != "missing":
        message = "the body must be a JSON object, sent with Content-Type: application/json"
        return error_body(message, "invalid_request_error", code="invalid_body")
    if first["type"] == "extra_forbidden":
        message = f"{'.'.join(where)[:200]} is not a field of this request"
        return error_body(message, "invalid_request_error", field and field[:200], "unknown_parameter")
    # for a union, pydantic names each alternative it tried; the field is enough
    path = ".".join(step for step in where if step.isidentifier() or step.isdecimal())[:200]
    message = f"{path or 'the body'}: {first['msg']}"
    return error_body(message, "invalid_request_error", field and field[:200], "invalid_value")
