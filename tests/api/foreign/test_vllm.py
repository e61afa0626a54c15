"""Bodies, status codes and texts as vLLM's clients know them."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.live_server import LiveServer
from tests.support.served import COMPLETION, PROMPT, events, settle

pytestmark = pytest.mark.slow
Check = Callable[[str, str], None]
ADDED = "Success: LoRA adapter 'sql' added successfully."
REMOVED = "Success: LoRA adapter 'sql' removed successfully."
TAKEN = (
    "The lora adapter 'sql' has already been loaded. If you want to load the adapter in place, set 'load_inplace' to "
    "True."
)


def load(http: httpx.Client, path: str, name: str = "sql", **fields: Any) -> httpx.Response:
    return http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path} | fields)


def unload(http: httpx.Client, name: str = "sql", **fields: Any) -> httpx.Response:
    return http.post("/v1/unload_lora_adapter", json={"lora_name": name} | fields)


def error(message: str, type: str, code: int, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def test_an_adapter_is_loaded_replaced_in_place_and_unloaded(
    http: httpx.Client, root: Path, serves: Check, is_gone: Callable[[str], None]
) -> None:
    late = str(root / "more" / "late")
    added = load(http, late, is_3d_lora_weight=False)
    assert (added.status_code, added.text) == (200, ADDED)
    assert added.headers["content-type"] == "text/plain; charset=utf-8"
    serves("sql", "late")
    for path in (late, "lora", "nowhere"):  # the name is what counts
        taken = load(http, path)
        assert (taken.status_code, taken.json()) == (400, error(TAKEN, "InvalidUserInput", 400))
    serves("sql", "late")
    replaced = load(http, "../more/other", load_inplace=True)
    assert (replaced.status_code, replaced.text) == (200, ADDED)
    serves("sql", "other")
    removed = unload(http, lora_int_id=None)
    assert (removed.status_code, removed.text) == (200, REMOVED)
    is_gone("sql")
    again = unload(http)
    assert (again.status_code, again.json()) == (
        404, error("The lora adapter 'sql' cannot be found.", "NotFoundError", 404)
    )  # fmt: skip


def test_in_place_needs_nothing_to_replace(http: httpx.Client, serves: Check) -> None:
    assert load(http, "../more/late", load_inplace=True, is_3d_lora_weight=True).text == ADDED
    assert load(http, "../more/late", load_inplace=True).text == ADDED  # the same weights again
    serves("sql", "late")
    assert unload(http, lora_int_id=7).text == REMOVED


@pytest.mark.parametrize("path", ["nowhere", "broken"])
def test_a_path_without_an_adapter(http: httpx.Client, path: str) -> None:
    missing = error(f"Loading lora sql failed: No adapter found for {path}", "NotFoundError", 404)
    refused = load(http, path)
    assert (refused.status_code, refused.json()) == (404, missing)


@pytest.mark.parametrize(
    ("body", "type", "says"),
    [
        ({"lora_path": "lora"}, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must be provided."),
        ({"lora_name": "sql", "lora_path": ""}, "InvalidUserInput", "Both 'lora_name' and 'lora_path' must"),
        ({"lora_name": "sql", "lora_path": "/etc"}, "BadRequestError", "outside"),
        ({"lora_name": "sql", "lora_path": "../tiny"}, "BadRequestError", "outside"),
        ({"lora_name": "a/b", "lora_path": "lora"}, "BadRequestError", "not an adapter name"),
        ({"lora_name": "tiny", "lora_path": "lora"}, "BadRequestError", "base model"),
        ({"lora_name": "LORA", "lora_path": "lora"}, "BadRequestError", "taken by 'lora'"),
        ({"lora_name": "sql", "lora_path": "a" * 300}, "BadRequestError", "File name too long"),
        ({"lora_name": "sql", "lora_path": "a\0"}, "BadRequestError", "NUL"),
        ({"lora_name": "sql", "lora_path": 1}, "BadRequestError", "lora_path: "),
        ({"lora_name": "sql", "lora_path": "lora", "base_model_name": "x"}, "BadRequestError", "is not a field"),
    ],
)
def test_refusals(http: httpx.Client, body: dict[str, Any], type: str, says: str) -> None:
    refused = http.post("/v1/load_lora_adapter", json=body)
    told = refused.json()["error"]
    assert refused.status_code == told["code"] == 400 and told["type"] == type and says in told["message"]


@pytest.mark.parametrize(
    "body",
    [
        r'{"lora_name": "sql", "lora_path": "lora", "\ud800": 1}',
        r'{"lora_name": "sql", "lora_path": "\ud800"}',
        r'{"lora_name": "\ud800", "lora_path": "lora"}',
    ],
)
def test_halves_of_surrogate_pairs(http: httpx.Client, body: str) -> None:
    for route in ("/v1/load_lora_adapter", "/load_lora_adapter"):
        refused = http.post(route, content=body, headers={"Content-Type": "application/json"})
        assert refused.status_code == 400 and refused.json()


def test_refusals_of_unloading(http: httpx.Client) -> None:
    unnamed = error("'lora_name' needs to be provided to unload a LoRA adapter.", "InvalidUserInput", 400)
    for body in ({}, {"lora_name": ""}):
        assert http.post("/v1/unload_lora_adapter", json=body).json() == unnamed
    base = unload(http, "tiny")
    assert base.status_code == 400 and "cannot be deleted" in base.json()["error"]["message"]
    not_json = http.post("/v1/unload_lora_adapter", content="lora_name=sql")
    assert not_json.status_code == 400 and not_json.json()["error"]["type"] == "BadRequestError"


def test_unloading_waits_for_what_runs(http: httpx.Client, server: LiveServer) -> None:
    assert load(http, "../more/late").text == ADDED
    long = {"model": "sql", "prompt": PROMPT, "max_tokens": 450, "stream": True, "n": 16}
    answers: list[tuple[int, str]] = []

    def remove() -> None:
        answer = httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "sql"}, timeout=60)
        answers.append((answer.status_code, answer.text))

    removing = threading.Thread(target=remove)
    with http.stream("POST", "/v1/completions", json=long) as streaming:
        lines = streaming.iter_lines()
        next(lines)
        removing.start()
        while httpx.post(f"{server.url}/v1/completions", json=COMPLETION | {"model": "sql"}).status_code != 404:
            pass
        assert answers == []
        assert events(lines)[-1]["choices"][0]["finish_reason"] == "length"
    removing.join(30)
    assert answers == [(200, REMOVED)]
    settle(server)
