"""Every error as its client sees it: status, shape, and nothing of ours."""

import asyncio
import logging
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException

from adapters_store.errors import AdapterError, Unforeseen
from server.api.transport.errors import install
from server.errors import (
    ADAPTER_STATUS,
    ClientLeft,
    EngineDead,
    HeddleError,
    InvalidRequest,
    ShuttingDown,
    TooManyHeaders,
)


def answer_to(raised: Exception) -> httpx.Response:
    """What a client of a route that raises this gets."""
    app = FastAPI(openapi_url=None)
    install(app)

    @app.get("/")
    async def route() -> None:
        raise raised

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/")

    return asyncio.run(ask())


def error_of(response: httpx.Response) -> Any:
    assert response.headers["content-type"] == "application/json" and set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("raised", "status", "error"),
    [
        (InvalidRequest("no", param="n"), 400, ("no", "invalid_request_error", "n", None)),
        (InvalidRequest("no", code="invalid_json"), 400, ("no", "invalid_request_error", None, "invalid_json")),
        (TooManyHeaders("no"), 431, ("no", "invalid_request_error", None, "invalid_http")),
        (EngineDead("gone"), 503, ("gone", "service_unavailable", None, "engine_dead")),
        (ShuttingDown(), 503, ("the server is shutting down", "service_unavailable", None, "shutting_down")),
        (ClientLeft(), 499, ("the client left", "client_left", None, None)),
    ],
    ids=str,
)
def test_our_errors_say_what_they_are(raised: HeddleError, status: int, error: tuple[Any, ...]) -> None:
    response = answer_to(raised)
    assert response.status_code == status
    assert error_of(response) == dict(zip(("message", "type", "param", "code"), error, strict=True))


@pytest.mark.parametrize("kind", ADAPTER_STATUS)
def test_each_refusal_of_an_adapter_has_its_status_and_code(kind: type[AdapterError]) -> None:
    status, code = ADAPTER_STATUS[kind]
    response = answer_to(kind("why"))
    assert response.status_code == status and "Retry-After" not in response.headers
    error = error_of(response)
    kind_told = {502: "bad_gateway", 503: "service_unavailable", 507: "insufficient_storage"}.get(
        status, "invalid_request_error"
    )
    assert (error["type"], error["code"]) == (kind_told, code) and "why" in error["message"]


def test_an_unforeseen_refusal_is_a_refusal() -> None:
    response = answer_to(Unforeseen(KeyError("what somebody wrote")))
    assert response.status_code == 422 and "KeyError" in error_of(response)["message"]
    assert "somebody" not in response.text


def test_only_what_passes_by_itself_may_be_tried_again() -> None:
    assert answer_to(EngineDead("gone")).headers["Retry-After"] == "1"
    assert "Retry-After" not in answer_to(InvalidRequest("no")).headers


@pytest.mark.parametrize("raised", [ValueError("/home/secret"), AdapterError("/home/secret")])
def test_an_error_of_our_own_is_logged_and_not_told(raised: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "heddle.api"):
        response = answer_to(raised)
    assert response.status_code == 500 and "secret" not in response.text
    assert error_of(response)["message"] == "internal error; it has been logged"
    assert "unexpected error in GET /" in caplog.text and "/home/secret" in caplog.text


@pytest.mark.parametrize(("status", "says"), [(404, "no such route"), (405, "not take that method"), (418, "teapot")])
def test_the_frameworks_errors_have_the_same_shape(status: int, says: str) -> None:
    response = answer_to(HTTPException(status, "I am a teapot"))
    assert response.status_code == status and says in error_of(response)["message"]


def test_halves_of_surrogate_pairs_do_not_keep_an_error_from_being_sent() -> None:
    error = error_of(answer_to(InvalidRequest("a\ud800b", param="\udfff")))
    assert (error["message"], error["param"]) == ("a?b", "?")
