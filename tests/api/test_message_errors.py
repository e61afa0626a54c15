"""Errors of Anthropic's routes: their types by our statuses, and one request id in header and body."""

import asyncio
import logging

import httpx
import pytest
from anthropic.types import ErrorResponse
from fastapi import FastAPI

from adapters_store.errors import AdapterQuarantined
from server.api.transport.errors import install
from server.api.transport.message_errors import are_spoken_at, worded
from server.errors import (
    AdapterDeleted,
    EngineDead,
    GenerationTimeout,
    HeddleError,
    InvalidRequest,
    Overloaded,
    ShuttingDown,
    TooManyOfAdapter,
    UnsupportedEncoding,
)
from tests.support.schemas import checked


def answer_to(raised: Exception, path: str = "/v1/messages") -> httpx.Response:
    """What a client of a route that raises this gets."""
    app = FastAPI()
    install(app)

    @app.get(path)
    async def route() -> None:
        raise raised

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("raised", "status", "kind"),
    [
        (InvalidRequest("no"), 400, "invalid_request_error"),
        (AdapterDeleted("no"), 404, "not_found_error"),
        (UnsupportedEncoding("no"), 415, "invalid_request_error"),
        (AdapterQuarantined("no"), 422, "invalid_request_error"),
        (TooManyOfAdapter("no"), 429, "rate_limit_error"),
        (ValueError("secret"), 500, "api_error"),
        (EngineDead("no"), 503, "api_error"),
        (Overloaded("no"), 503, "overloaded_error"),
        (ShuttingDown(), 503, "overloaded_error"),
        (GenerationTimeout("no"), 504, "timeout_error"),
    ],
    ids=lambda it: type(it).__name__ if isinstance(it, Exception) else None,
)
def test_each_status_has_its_type(raised: Exception, status: int, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.CRITICAL):
        response = answer_to(raised)
    error = checked(ErrorResponse, response.json())
    assert response.status_code == status and error.error.type == kind
    assert error.request_id == response.headers["request-id"] and error.request_id.startswith("req_")
    assert ("retry-after" in response.headers) == (status == 503) and "secret" not in response.text
    if isinstance(raised, HeddleError):  # a stream says the same when it can send no status any more
        body = {"error": {"message": "no", "type": raised.type, "param": None, "code": raised.code}}
        assert status in (415, 422) or worded(body, "req_1")["error"] == {"type": kind, "message": "no"}


def test_a_message_names_the_field_that_it_is_about() -> None:
    assert answer_to(InvalidRequest("may not be empty", param="a")).json()["error"]["message"] == "a: may not be empty"
    assert answer_to(InvalidRequest("a is empty", param="a")).json()["error"]["message"] == "a is empty"


def test_other_routes_keep_openais_shape() -> None:
    response = answer_to(InvalidRequest("no"), "/v1/messages_of_others")
    assert set(response.json()) == {"error"} and "request-id" not in response.headers
    assert are_spoken_at("/v1/messages") and are_spoken_at("/v1/messages/count_tokens")
    assert not are_spoken_at("/v1/messages2") and not are_spoken_at("/v1/chat/completions")
