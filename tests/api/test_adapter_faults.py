"""Adapters that fail in the engine, as clients of every route see it, over a real socket."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.engine.messages import StepDone, TokenEvent
from server.engine.request import Fault, FinishReason
from tests.support.adapter_files import lora
from tests.support.fake_server import FakeServer
from tests.support.waiting import eventually

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
    "/v1/responses": {"input": "x", "max_output_tokens": 16},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
    "/v1/embeddings": {"input": "x"},
}
REASON = "its outputs are not finite"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    for name in ("a", "b", "c"):
        lora(tmp_path / name)
    with FakeServer(tmp_path).running() as it:
        yield it


@pytest.fixture
def http(server: FakeServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=20) as client:
        for name, path in (("x", "a"), ("same", "a"), ("other", "b")):
            register(client, name, path)
        yield client


def register(http: httpx.Client, name: str, path: str) -> httpx.Response:
    answer = http.put(f"/v1/adapters/{name}", json={"path": path})
    assert answer.status_code in (200, 201), answer.text
    return answer


def ask(http: httpx.Client, model: str, route: str = "/v1/completions", **more: Any) -> httpx.Response:
    return http.post(route, json={"model": model} | ROUTES[route] | more)


def told(http: httpx.Client, name: str) -> dict[str, Any]:
    answer: dict[str, Any] = http.get(f"/v1/adapters/{name}").json()
    return answer


def check_refusal(answer: httpx.Response, route: str, status: int, code: str, says: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert says in error["message"]
    assert route == "/v1/messages" or error["code"] == code
    assert answer.headers.get("Retry-After") == ("1" if status == 503 else None)
    assert answer.headers.get("x-should-retry") == ("false" if status == 422 else None)


@pytest.mark.parametrize("route", ROUTES)
def test_one_that_cannot_be_brought_is_unavailable_and_others_go_on(
    server: FakeServer, http: httpx.Client, route: str
) -> None:
    assert ask(http, "x", route).status_code == 200
    server.residency.unavailable["x"] = "there is no memory for it"
    answer = ask(http, "x", route)
    check_refusal(answer, route, 503, "adapter_unavailable", "'x' could not be loaded: there is no memory for it")
    assert answer.headers["content-type"] == "application/json"
    assert ask(http, "other", route).status_code == ask(http, "tiny", route).status_code == 200
    assert told(http, "x")["state"] == "ready"  # its files are sound
    server.residency.unavailable.clear()
    assert ask(http, "x", route).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_one_in_quarantine_is_so_at_once_under_every_name(server: FakeServer, http: httpx.Client, route: str) -> None:
    assert ask(http, "x", route).status_code == 200
    revision = told(http, "x")["revision"]
    register(http, "x", "c")  # what the engine gives up is what x meant before
    server.quarantine("same", REASON)
    assert ask(http, "x", route).status_code == ask(http, "other", route).status_code == 200
    steps = server.service.client.stats.steps
    for model in ("same", f"x@{revision}"):
        check_refusal(ask(http, model, route), route, 422, "adapter_quarantined", REASON)
    eventually(lambda: told(http, "same")["state"] == "quarantined")
    for model in ("same", f"x@{revision}"):
        check_refusal(ask(http, model, route), route, 422, "adapter_quarantined", f"{REASON}: register it again")
    assert server.service.client.stats.steps >= steps and told(http, "x")["state"] == "ready"


def test_it_is_told_of_its_state_and_where_it_is(server: FakeServer, http: httpx.Client) -> None:
    device = {"state": "absent", "bytes": 0, "host_bytes": 0, "running_requests": 0}
    assert told(http, "x")["device"] == device
    ask(http, "x")
    assert told(http, "same")["device"] == device | {"state": "resident", "bytes": 1000}
    server.quarantine("x", REASON)
    eventually(lambda: told(http, "same")["state"] == "quarantined")
    assert told(http, "x")["fault"] == f"{REASON}: register it again"
    assert told(http, "x")["device"]["state"] == "quarantined"
    log = http.get("/v1/store/log").json()["data"]
    assert [it["actor"] for it in log if it["action"] == "quarantine"] == ["the engine"]


def test_a_request_that_comes_before_the_catalogue_knows_is_told_the_same(
    server: FakeServer, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the disk takes to write it down, requests still go to the engine."""
    ask(http, "x")
    monkeypatch.setattr(server.service.lifecycle, "moved", lambda _: None)
    server.service.client.on_device._followers.clear()
    server.quarantine("x", REASON)
    for stream in (False, True):
        answer = ask(http, "x", stream=stream)
        check_refusal(answer, "/v1/completions", 422, "adapter_quarantined", f"'x' is in quarantine: {REASON}")
    assert told(http, "x")["state"] == "ready"


def test_registering_it_again_lifts_it_in_the_engine_too(server: FakeServer, http: httpx.Client) -> None:
    before = ask(http, "x", temperature=0).json()["choices"]
    server.quarantine("x", REASON)
    eventually(lambda: told(http, "x")["state"] == "quarantined")
    assert register(http, "same", "a").json()["state"] == "ready"
    assert ask(http, "x", temperature=0).json()["choices"] == before
    assert told(http, "x")["fault"] is None and told(http, "x")["device"]["state"] != "quarantined"


def test_whoever_was_told_and_registers_it_again_is_served(server: FakeServer, http: httpx.Client) -> None:
    """However soon: what the engine gave up is written down before the registration is looked at."""
    ask(http, "x")
    for round in range(20):
        server.quarantine("x", REASON)
        answer = ask(http, "same", stream=round % 2 == 0)
        check_refusal(answer, "/v1/completions", 422, "adapter_quarantined", REASON)
        register(http, ("x", "same", "new")[round % 3], "a")
        assert ask(http, "same").status_code == ask(http, "x").status_code == 200


def test_nobody_elses_stream_ends_with_it(server: FakeServer, http: httpx.Client) -> None:
    ask(http, "x")
    body = {"model": "other", "prompt": "x", "max_tokens": 900, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server.quarantine("x", REASON)
        assert httpx.post(f"{server.url}/v1/completions", json=body | {"model": "x"}).status_code == 422
        assert list(lines)[-2] == "data: [DONE]"


def test_verifying_it_lifts_it_if_it_is_sound(server: FakeServer, http: httpx.Client) -> None:
    ask(http, "x")
    server.quarantine("x", "its file changed while it was copied")
    eventually(lambda: told(http, "x")["state"] == "quarantined")
    answer = http.post("/v1/adapters/x/verify")
    assert answer.status_code == 200 and answer.json()["state"] == "ready", answer.text
    assert ask(http, "same").status_code == 200


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.QUARANTINED])
@pytest.mark.parametrize("route", [it for it in ROUTES if it != "/v1/embeddings"])
def test_a_stream_that_has_begun_ends_with_an_error_event(
    server: FakeServer, http: httpx.Client, route: str, fault: Fault
) -> None:
    def fail() -> None:
        client = server.service.client
        [number] = client._requests
        event = TokenEvent(number, None, FinishReason.ERROR, "given up: why", fault=fault)
        client.hear(StepDone([event], client.stats))

    body = {"model": "x"} | ROUTES[route] | {"stream": True}
    body["max_output_tokens" if "max_output_tokens" in body else "max_tokens"] = 900
    with http.stream("POST", route, json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        next(lines)
        server.in_front(fail)
        rest = "\n".join(lines)
    code = {"unavailable": "adapter_unavailable", "quarantined": "adapter_quarantined",
            "grammar": "grammar_failed"}[fault.value]  # fmt: skip
    assert "given up: why" in rest and "[DONE]" not in rest
    assert code in rest if route != "/v1/messages" else '"type":"error"' in rest
