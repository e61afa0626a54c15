"""Commands while a real server has the store: changes go over HTTP, backups beside it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store.catalog import Catalog
from adapters_store.store.store import open_store
from server import storage
from server.lifecycle.registry import Registry
from tests.support.live_server import LiveServer, write_tokenizer
from tests.support.served import VOCAB, tiny
from tests.support.tiny_adapters import save_lora
from tests.support.tiny_models import save_model

pytestmark = pytest.mark.slow
Heddle = Callable[..., Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("beside")
    write_tokenizer(save_model(root / "tiny", "qwen3_moe", vocab_size=VOCAB))
    for number in range(4):
        save_lora(root / "adapters" / f"lora{number}", tiny(), number, ("q_proj",))
    save_lora(root / "elsewhere", tiny(), 9, ("q_proj",))
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[LiveServer]:
    server = LiveServer(str(root / "tiny"), "--adapter-root", str(root / "adapters"), log=root / "log").wait_ready()
    yield server
    assert server.stop() == 0, server.output()


@pytest.fixture
def store(root: Path, server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(server.data))
    return storage.default_store(root / "tiny")


def test_a_server_that_has_the_store_is_asked(heddle: Heddle, root: Path, server: LiveServer, store: Path) -> None:
    base = ("--model", root / "tiny")
    added = heddle("adapters", "add", "one", root / "adapters" / "lora0", "--verify", *base, "--json")
    assert added.status == 0 and added.json["parity"]["max_difference"] < 1e-3
    assert added.err == f"heddle: the server at {server.url}\n"
    assert {it["id"] for it in httpx.get(f"{server.url}/v1/adapters").json()["data"]} == {"one"}
    for place in (base, ("--store", store)):
        listed = heddle("adapters", "list", *place, "--json")
        assert [it["id"] for it in listed.json["adapters"]] == ["one"] and server.url in listed.err
    replaced = heddle("adapters", "add", "one", root / "adapters" / "lora1", "--replace", *base)
    assert replaced.status == 0
    verified = heddle("adapters", "verify", *base, "--json")
    assert verified.status == 0 and len(verified.json) == 2  # with what was replaced
    none = heddle("adapters", "verify", "none", *base)
    assert none.status == 1 and "no adapter is named" in none.out
    assert heddle("adapters", "gc", *base).status == 0
    removed = heddle("adapters", "remove", "one", "--drain-s", "0", *base)
    assert removed.status == 0 and "one is deleted" in removed.out
    assert heddle("adapters", "remove", "one", *base).status == 1
    log = heddle("store", "log", *base, "--json").json
    assert [it["action"] for it in log] == ["register", "replace", "check", "check", "delete"]


def test_damage_is_found_by_a_server_and_mended_by_registering_again(heddle: Heddle, root: Path, store: Path) -> None:
    place = ("--store", store)
    assert heddle("adapters", "add", "hurt", root / "adapters" / "lora3", *place).status == 0
    raw = (root / "adapters" / "lora3" / "adapter_model.safetensors").read_bytes()
    (blob,) = (store / "blobs").rglob(sha256(raw).hexdigest())
    blob.chmod(0o600)
    blob.write_bytes(bytes(blob.stat().st_size))
    found = heddle("adapters", "verify", "hurt", *place, "--json")
    assert found.status == 1 and "register it again" in found.json[0]["fault"]
    assert heddle("adapters", "add", "hurt", root / "adapters" / "lora3", *place).status == 0
    assert heddle("adapters", "verify", "hurt", *place).status == 0
    assert heddle("adapters", "remove", "hurt", *place).status == 0


def test_what_a_server_refuses_is_told_with_what_to_do(heddle: Heddle, root: Path, store: Path) -> None:
    refused = heddle("adapters", "add", "far", root / "elsewhere", "--store", store)
    assert refused.status == 1 and refused.out == "" and "--adapter-root" in refused.err
    assert len(refused.err.splitlines()) == 2


def test_all_pages_are_listed(
    heddle: Heddle, root: Path, server: LiveServer, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.commands.over_http._PAGE", 2)
    names = [f"p{number}" for number in range(5)]
    for name in names:
        assert heddle("adapters", "add", name, root / "adapters" / "lora2", "--store", store).status == 0
    assert [it["id"] for it in heddle("adapters", "list", "--store", store, "--json").json["adapters"]] == names
    for url in (server.url, f"{server.url}/v1/"):
        assert len(heddle("adapters", "list", "--url", url, "--json").json["adapters"]) == 5
    assert len(heddle("store", "log", "--url", server.url, "--json").json) >= 5
    for name in names:
        assert heddle("adapters", "remove", name, "--store", store).status == 0


def test_no_proxy_is_asked_for_a_server_on_this_machine(
    heddle: Heddle, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert heddle("adapters", "list", "--store", store).status == 0


def test_what_is_no_server_of_ours(heddle: Heddle) -> None:
    done = heddle("adapters", "list", "--url", "http://127.0.0.1:9")
    assert done.status == 70 and "does not answer" in done.err and len(done.err.splitlines()) == 2


def test_backups_while_adapters_come_and_go(
    heddle: Heddle, root: Path, server: LiveServer, store: Path, tmp_path: Path
) -> None:
    """Each copy is consistent, and a server takes it."""
    done, errors = threading.Event(), list[object]()

    def churn() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            number = 0
            while not done.is_set():
                body = {"name": f"n{number % 3}", "path": str(root / "adapters" / f"lora{number % 4}")}
                answers = [http.put(f"/v1/adapters/{body['name']}", json=body), http.post("/v1/store/gc")]
                if number % 2:
                    answers.append(http.delete(f"/v1/adapters/{body['name']}"))
                errors.extend(it.text for it in answers if it.status_code not in (200, 201))
                number += 1

    churning = threading.Thread(target=churn)
    churning.start()
    copies = [tmp_path / f"copy{number}" for number in range(8)]
    try:
        results = [heddle("store", "backup", copy, "--store", store, "--json") for copy in copies]
    finally:
        done.set()
        churning.join()
    assert errors == []
    whole = [copy for copy, result in zip(copies, results, strict=True) if result.status == 0]
    assert len(whole) >= 6, [result.err for result in results]
    for result, copy in zip(results, copies, strict=True):
        assert result.status == 0 or not copy.exists()
    for copy in whole:
        with closing(open_store(copy)) as opened:
            registry = Registry(Catalog("tiny"), opened, True)
            registry.load()
            registry.catalog.check()
            assert not any(opened.blobs.fault(it, read=True) for it in opened.blobs.present())
            expected = {it.name for it in registry.catalog}
            assert all(registry.catalog.find(name).weights.fault is None for name in expected)
    restored = LiveServer(str(root / "tiny"), "--store", str(whole[-1]), log=tmp_path / "log").wait_ready()
    try:
        listed = httpx.get(f"{restored.url}/v1/adapters").json()["data"]
        assert {it["id"] for it in listed} == expected and all(it["state"] == "ready" for it in listed)
    finally:
        assert restored.stop() == 0, restored.output()
