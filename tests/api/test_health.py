"""What probes are told, and when: each out of the front's own knowledge, whatever the engine does."""

import asyncio
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from server.api.app import create_app
from server.api.service import Service
from server.config import EngineConfig, ServerConfig
from server.errors import EngineDead
from server.version import VERSION
from tests.support.live_server import LiveServer
from tests.support.served import COMPLETION, settle

SILENT = {"status": "engine_silent", "reason": "the engine has said nothing for 31 s"}
OK = {"status": "ok"}


class Client:
    def __init__(self, death: str | None, silence_s: float, num_requests: int) -> None:
        self.death, self.silence_s, self.num_requests = death, silence_s, num_requests

    def require_alive(self) -> None:
        if self.death is not None:
            raise EngineDead(self.death)


def ask(method: str, path: str, death: str | None = None, silence_s: float = 0.0, num_requests: int = 0,
        is_draining: bool = False) -> httpx.Response:  # fmt: skip
    config = ServerConfig(EngineConfig("."), max_concurrent_requests=8)
    unused: Any = SimpleNamespace(limits=SimpleNamespace(max_upload_bytes=1))
    client: Any = Client(death, silence_s, num_requests)
    service = Service(config, unused, client, unused, unused, unused, unused, unused, unused, started=0)
    service.is_draining = is_draining

    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, path)

    return asyncio.run(answer())


@pytest.mark.parametrize(
    ("state", "health", "live", "ready"),
    [
        ({}, OK, OK, OK),
        ({"silence_s": 30.0}, OK, OK, OK),
        ({"silence_s": 30.6}, SILENT, SILENT, SILENT),
        ({"death": "killed"}, {"status": "engine_dead", "reason": "killed"},
         {"status": "engine_dead", "reason": "killed"}, {"status": "engine_dead", "reason": "killed"}),
        ({"is_draining": True}, {"status": "shutting_down"}, OK,
         {"status": "shutting_down", "reason": "the server is shutting down"}),
        ({"num_requests": 7}, OK, OK, OK),
        ({"num_requests": 8}, OK, OK,
         {"status": "overloaded", "reason": "8 completions are under way; at most 8 are taken at once"}),
    ],
    ids=["well", "quiet", "silent", "dead", "draining", "busy", "full"],
)  # fmt: skip
def test_each_probe_says_what_it_is_asked(
    state: dict[str, Any], health: dict[str, str], live: dict[str, str], ready: dict[str, str]
) -> None:
    for path, told in (("/health", health), ("/ping", health), ("/live", live), ("/ready", ready)):
        response = ask("GET", path, **state)
        assert (response.status_code, response.json()) == (200 if told == OK else 503, told), path
        head = ask("HEAD", path, **state)
        assert (head.status_code, head.headers) == (response.status_code, response.headers)
        assert ("retry-after" in response.headers) == (path == "/ready" and told != OK)
    assert ask("POST", "/ping", **state).json() == health
    assert ask("GET", "/version", **state).json() == {"version": VERSION}


def test_to_ask_whether_it_is_ready_takes_no_place() -> None:
    for _ in range(3):
        assert ask("GET", "/ready", num_requests=7).status_code == 200


@pytest.mark.slow
def test_probes_do_not_wait_for_the_engine(server: LiveServer, http: httpx.Client) -> None:
    """Which works, and then stands still in the midst of it."""

    def complete(_: int) -> int:
        return httpx.post(
            f"{server.url}/v1/completions", json=COMPLETION | {"max_tokens": 200, "n": 4}, timeout=90
        ).status_code

    engine = server.engine.pid
    with ThreadPoolExecutor(8) as pool:
        under_way = [pool.submit(complete, number) for number in range(8)]
        try:
            for stands_still in (False, True):
                if stands_still:
                    os.kill(engine, signal.SIGSTOP)
                for path in ("/live", "/ready", "/health", "/ping", "/version") * 4:
                    begun = time.monotonic()
                    assert http.get(path).status_code == 200
                    assert time.monotonic() - begun < 10  # while it stands still, never
        finally:
            os.kill(engine, signal.SIGCONT)
        assert [it.result() for it in under_way] == [200] * 8
    settle(server)
