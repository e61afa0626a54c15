"""Bodies, status codes and texts as SGLang's clients know them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from server.api.foreign import sglang

Check = Callable[[str, str], None]
AT_START = {"esft": "esft", "lora": "lora"}


def load(http: httpx.Client, path: str, name: str = "sql", **fields: Any) -> httpx.Response:
    return http.post("/load_lora_adapter", json={"lora_name": name, "lora_path": path} | fields)


def unload(http: httpx.Client, name: str = "sql") -> httpx.Response:
    return http.post("/unload_lora_adapter", json={"lora_name": name})


def told(success: bool, error_message: str, **loaded: str) -> dict[str, Any]:
    return {"success": success, "error_message": error_message, "loaded_adapters": AT_START | loaded}


@pytest.mark.slow
def test_an_adapter_is_loaded_once_and_unloaded_once(
    http: httpx.Client, root: Path, serves: Check, is_gone: Callable[[str], None]
) -> None:
    added = load(http, str(root / "more" / "late"))
    assert (added.status_code, added.json()) == (200, told(True, "", sql="late"))
    serves("sql", "late")
    assert http.get("/v1/adapters/sql").json()["manifest"] == {}
    for path in ("../more/late", "lora"):
        taken = load(http, path)
        again = told(False, "Failed to load LoRA adapter sql because it is already loaded", sql="late")
        assert (taken.status_code, taken.json()) == (400, again)
    removed = unload(http)
    assert (removed.status_code, removed.json()) == (200, told(True, ""))
    is_gone("sql")
    gone = unload(http)
    assert (gone.status_code, gone.json()) == (400, told(False, "LoRA with name sql does not exist."))


@pytest.mark.slow
def test_pinned(http: httpx.Client, serves: Check) -> None:
    assert load(http, "../more/late", pinned=True, lora_id=None).json()["success"]
    assert http.get("/v1/adapters/sql").json()["manifest"] == {"pinned": True}
    serves("sql", "late")
    assert unload(http).json()["success"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"lora_name": "sql"}, "lora_path: Field required"),
        ({"lora_name": "", "lora_path": "lora"}, "lora_name: "),
        ({"lora_name": "sql", "lora_path": "/etc"}, "outside"),
        ({"lora_name": "sql", "lora_path": "nowhere"}, "is not a directory"),
        ({"lora_name": "sql", "lora_path": "broken"}, "holds no adapter"),
        ({"lora_name": "a/b", "lora_path": "lora"}, "not an adapter name"),
        ({"lora_name": "tiny", "lora_path": "lora"}, "base model"),
        ({"lora_name": "sql", "lora_path": "lora", "pinned": "yes"}, "pinned: "),
        ({"lora_name": "sql", "lora_path": "lora", "lora_id": "7"}, "lora_id: "),
        ({"lora_name": "sql", "lora_path": "lora", "added_tokens_config": {}}, "'added_tokens_config' is not a field"),
    ],
)
def test_refusals(http: httpx.Client, body: dict[str, Any], says: str) -> None:
    refused = http.post("/load_lora_adapter", json=body)
    assert refused.status_code == 400 and says in refused.json()["error_message"]
    assert refused.json() == told(False, refused.json()["error_message"])


@pytest.mark.slow
def test_the_base_is_not_unloaded(http: httpx.Client) -> None:
    refused = unload(http, "tiny")
    assert refused.status_code == 400 and "cannot be deleted" in refused.json()["error_message"]


def test_the_list_is_bounded_and_holds_what_was_asked_for() -> None:
    class Many(dict[str, Any]):
        def page(self, after: None, limit: int) -> list[Any]:
            return list(self.values())[:limit]

    names = [f"a{index:05}" for index in range(3000)]
    many = Many({name: SimpleNamespace(name=name, current=SimpleNamespace(root=f"at/{name}")) for name in names})
    service: Any = SimpleNamespace(catalog=many)
    listed = json.loads(bytes(sglang._answer(service, 200, name="a02999").body))["loaded_adapters"]
    assert list(listed) == [*names[:1000], "a02999"] and listed["a02999"] == "at/a02999"
    assert len(json.loads(bytes(sglang._answer(service, 200, name="a00007").body))["loaded_adapters"]) == 1000
