"""Pages in browsers: what a preflight is told, what refusals carry, and which origins are none."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from server.api.app import create_app
from server.api.service import Service
from server.config import EngineConfig, ServerConfig
from server.errors import ConfigError
from server.exits import EXIT_CONFIG, status_of

PAGE, OTHER = "https://chat.example", "https://other.example"


def ask(origins: tuple[str, ...], method: str, path: str, **headers: str) -> httpx.Response:
    config = ServerConfig(EngineConfig("."), cors_origins=origins)
    unused: Any = SimpleNamespace(limits=SimpleNamespace(max_upload_bytes=1))
    service = Service(config, unused, unused, unused, unused, unused, unused, unused, unused, started=0)

    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return asyncio.run(answer())


def preflight(origins: tuple[str, ...], origin: str) -> httpx.Response:
    return ask(origins, "OPTIONS", "/v1/chat/completions", origin=origin, access_control_request_method="POST",
               access_control_request_headers="authorization,content-type,x-stainless-os")  # fmt: skip


def test_nothing_is_open_unless_the_operator_says_so() -> None:
    response = preflight((), PAGE)
    assert response.status_code == 405 and set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert not [name for name in ask((), "GET", "/version", origin=PAGE).headers if name.startswith("access-control")]


@pytest.mark.parametrize(("origins", "told"), [((PAGE, OTHER), PAGE), (("*",), "*")])
def test_a_preflight_of_openais_client_passes(origins: tuple[str, ...], told: str) -> None:
    response = preflight(origins, PAGE)
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == told
    assert response.headers["access-control-allow-headers"] == "authorization,content-type,x-stainless-os"
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in response.headers


def test_a_page_that_was_not_named_is_told_nothing() -> None:
    assert preflight((PAGE,), OTHER).status_code == 400
    for response in (preflight((PAGE,), OTHER), ask((PAGE,), "GET", "/version", origin=OTHER)):
        assert "access-control-allow-origin" not in response.headers and "Origin" in response.headers["vary"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/version", {}, 200),
        ("GET", "/nope", {}, 404),
        ("DELETE", "/version", {}, 405),
        ("POST", "/v1/completions", {"content_length": "9999999999"}, 413),
        ("POST", "/v1/completions", {"content_encoding": "gzip"}, 415),
        ("POST", "/v1/completions", {f"x_{number}": "1" for number in range(101)}, 431),
        ("GET", "/metrics", {}, 500),  # this service has none
    ],
)
def test_whatever_is_answered_a_script_may_read_it(
    method: str, path: str, headers: dict[str, str], status: int
) -> None:
    response = ask((PAGE,), method, path, origin=PAGE, expect="100-continue", **headers)
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == PAGE and "Origin" in response.headers["vary"]
    assert response.headers["access-control-expose-headers"] == "Retry-After, Upload-Offset, request-id, x-should-retry"


@pytest.mark.parametrize(
    ("origins", "origin", "is_refused"),
    [((), PAGE, True), ((PAGE,), PAGE, False), ((PAGE,), OTHER, True), (("*",), OTHER, False), ((PAGE,), None, True)],
)
@pytest.mark.parametrize("path", ["/v1/uploads", "/v1/store/gc", "/v1/adapters/a/verify", "/v1/adapters/a/rollback"])
def test_what_browsers_send_unasked_is_taken_from_named_pages_only(
    path: str, origins: tuple[str, ...], origin: str | None, is_refused: bool
) -> None:
    headers = {"origin": origin} if origin else {}
    response = ask(origins, "POST", path, sec_fetch_site="cross-site", **headers)
    is_cross_site = response.status_code == 400 and response.json()["error"]["code"] == "cross_site"
    assert is_cross_site is is_refused
    assert ask(origins, "POST", path).status_code == 500  # no browser: it gets as far as the uploads that are not there


@pytest.mark.parametrize(
    "origin",
    ["*", PAGE, "http://localhost:3000", "http://[::1]:8080", "https://a.b:80", "tauri://localhost", "http://x:65535",
     "chrome-extension://abcdefghijklmnop"],
)  # fmt: skip
def test_origins_as_browsers_write_them_are_taken(origin: str) -> None:
    assert ServerConfig(EngineConfig("."), cors_origins=(origin,)).cors_origins == (origin,)


@pytest.mark.parametrize(
    "origin",
    ["", "null", "chat.example", "https://", "https://chat.example/", "https://chat.example/path", "https://Chat.example",
     "HTTPS://chat.example", "https://*.example", "https://chat.example:443", "http://chat.example:80", "https://a b",
     "https://user@chat.example", "https://chat.example:", "https://chat.example:0443", "https://ch\u00e4t.example",
     "https://chat.example\n", "https://a,https://b"],
)  # fmt: skip
def test_what_no_browser_sends_ends_the_start(origin: str) -> None:
    with pytest.raises(ConfigError, match="is none that a browser sends") as refusal:
        ServerConfig(EngineConfig("."), cors_origins=(origin,))
    assert status_of(refusal.value) == EXIT_CONFIG == 78


def test_all_and_some_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match="beside others"):
        ServerConfig(EngineConfig("."), cors_origins=("*", PAGE))
