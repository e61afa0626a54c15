"""Bodies and texts as NVIDIA Dynamo's clients know them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.foreign.dynamo import lora_id, path_of
from server.errors import InvalidRequest

Check = Callable[[str, str], None]
SQL = 1_321_714_994


def load(http: httpx.Client, uri: str, name: str = "sql") -> httpx.Response:
    return http.post("/v1/loras", json={"lora_name": name, "source": {"uri": uri}})


def done(what: str) -> dict[str, Any]:
    message = f"LoRA adapter 'sql' {what}"
    return {"status": "success", "message": message, "lora_name": "sql", "lora_id": SQL}


@pytest.mark.slow
def test_an_adapter_is_loaded_listed_and_unloaded(
    http: httpx.Client, root: Path, serves: Check, is_gone: Callable[[str], None]
) -> None:
    at_start = {"esft": lora_id("esft"), "lora": lora_id("lora")}
    assert http.get("/v1/loras").json() == {"status": "success", "loras": at_start, "count": 2}
    uri = (root / "more" / "late").as_uri()
    for what in ("loaded successfully", "already loaded"):
        answer = load(http, uri)
        assert (answer.status_code, answer.json()) == (200, done(what))
    serves("sql", "late")
    assert http.get("/v1/loras").json() == {"status": "success", "loras": at_start | {"sql": SQL}, "count": 3}
    other = load(http, (root / "more" / "other").as_uri())
    assert other.status_code == 409 and "taken by other weights" in other.json()["message"]
    serves("sql", "late")
    removed = http.delete("/v1/loras/sql")
    assert (removed.status_code, removed.json()) == (200, done("unloaded successfully"))
    is_gone("sql")
    for name in ("sql", "org/sql"):
        gone = http.delete(f"/v1/loras/{name}")
        told = {"status": "error", "message": f"LoRA adapter '{name}' not found."}
        assert (gone.status_code, gone.json()) == (404, told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"lora_name": "sql"}, 400, "source: Field required"),
        ({"lora_name": "sql", "source": {}}, 400, "source.uri: Field required"),
        ({"lora_name": "sql", "source": {"uri": "s3://bucket/sql"}}, 400, "remote sources are not enabled"),
        ({"lora_name": "sql", "source": {"uri": "hf://org/sql"}}, 400, "remote sources are not enabled"),
        ({"lora_name": "sql", "source": {"uri": "file:///etc"}}, 400, "outside"),
        ({"lora_name": "a/b", "source": {"uri": "file:///etc"}}, 400, "not an adapter name"),
        ({"lora_name": "tiny", "source": {"uri": "file:///etc"}}, 409, "base model"),
        ({"lora_name": "sql", "source": {"uri": "file:///etc", "revision": "1"}}, 400, "'revision' is not a field"),
        ({"lora_name": "sql", "source": {"uri": "file:///etc"}, "load_inplace": True}, 400, "is not a field"),
    ],
)
def test_refusals(http: httpx.Client, body: dict[str, Any], status: int, says: str) -> None:
    refused = http.post("/v1/loras", json=body)
    assert refused.status_code == status
    assert refused.json().keys() == {"status", "message"} and refused.json()["status"] == "error"
    assert says in refused.json()["message"]


@pytest.mark.slow
def test_a_directory_without_an_adapter(http: httpx.Client, root: Path) -> None:
    for name, says in {"nowhere": "is not a directory", "broken": "holds no adapter"}.items():
        refused = load(http, (root / "adapters" / name).as_uri())
        assert refused.status_code == 422 and says in refused.json()["message"]


def test_the_number_of_a_name() -> None:
    """Other processes may have kept it."""
    assert lora_id("sql") == SQL
    assert lora_id("esft") != lora_id("lora")


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///a/b", "/a/b"),
        ("FILE:///a/b", "/a/b"),
        ("file:///a%20b/%C3%A9%3F%23%25", "/a b/é?#%"),
        ("file:///a+b", "/a+b"),
        ("file:////a", "//a"),
        ("file:///a/../b%2Fc%00", "/a/../b/c\0"),  # the rules of paths are for those who open them
    ],
)
def test_paths_of_uris(uri: str, path: str) -> None:
    assert path_of(uri) == path


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("/a/b", "must be a URI"),
        ("file:/a/b", "must be a URI"),
        ("https://host/a", "remote sources"),
        ("file://host/a", "names a host"),
        ("file://localhost/a", "names a host"),
        ("file://a", "names a host"),
        ("file:///a?b=c", "query"),
        ("file:///a#b", "fragment"),
        ("file:///%ff", "not UTF-8"),
    ],
)
def test_other_uris_are_refused(uri: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        path_of(uri)
