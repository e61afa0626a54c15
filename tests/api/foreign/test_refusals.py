"""A refusal keeps its reason in whatever shape it leaves."""

from collections.abc import Callable

import pytest
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.testclient import TestClient

from adapters_store.errors import AdapterError, CatalogFull, NoAdapterThere, StoreFull
from server.api.foreign import dynamo, vllm
from server.api.foreign.refusals import Refusal, refusal_of, refusing_as
from server.errors import HeddleError, InvalidRequest, Overloaded


def raising(error: Exception, told: Callable[[Request, Refusal], Response]) -> TestClient:
    router = APIRouter(route_class=refusing_as(told))

    @router.get("/")
    async def refuse() -> None:
        raise error

    app = FastAPI()
    app.include_router(router)
    return TestClient(app)


def test_every_kind_of_refusal_has_a_status() -> None:
    assert refusal_of(NoAdapterThere("x")) == Refusal(422, "x")  # by its parent's
    assert refusal_of(CatalogFull("x")) == Refusal(409, "x")
    assert refusal_of(InvalidRequest("x\ud800", param="\ud800")) == Refusal(400, r"x\ud800", r"\ud800")


@pytest.mark.parametrize(
    ("error", "of_vllm", "of_dynamo"),
    [
        (CatalogFull("full"), (400, "BadRequestError"), 409),
        (StoreFull("full"), (507, "InternalServerError"), 507),
        (Overloaded("full"), (503, "ServiceUnavailableError"), 503),
    ],
)
def test_statuses_as_each_knows_them(
    error: AdapterError | HeddleError, of_vllm: tuple[int, str], of_dynamo: int
) -> None:
    status, type = of_vllm
    answer = raising(error, vllm._told).get("/")
    assert answer.status_code == status and answer.headers.get("retry-after") == ("1" if status == 503 else None)
    assert answer.json() == {"error": {"message": "full", "type": type, "param": None, "code": status}}
    answer = raising(error, dynamo._told).get("/")
    assert (answer.status_code, answer.json()) == (of_dynamo, {"status": "error", "message": "full"})


def test_a_fault_of_our_own_is_no_refusal() -> None:
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError(), vllm._told).get("/")
