"""`heddle adapters` on a store that no server has open."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from adapters_store.catalog import Catalog, Change
from adapters_store.records import Alias, Target
from adapters_store.store.store import DATABASE, open_store
from server.commands.reach import actor
from server.lifecycle.registry import Registry
from tests.support.adapter_files import edit_weights, lora
from tests.support.commands import ROOT

Heddle = Callable[..., Any]


def blob_of(store: Path, file: str = "adapter_model.safetensors") -> Path:
    with closing(sqlite3.connect(store / DATABASE)) as database:
        (sha256,) = database.execute("SELECT sha256 FROM files WHERE file = ?", (file,)).fetchone()
    return store / "blobs" / sha256[:2] / sha256


def overwrite(blob: Path) -> None:
    """Other bytes, as many."""
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.chmod(0o600)
    blob.write_bytes(raw)


def test_an_adapter_is_added_listed_and_removed(heddle: Heddle, store: Path, one: Path) -> None:
    added = heddle("adapters", "add", "one", one, "--store", store)
    assert (added.status, added.err) == (0, f"heddle: offline, in the store {str(store)!r}\n")
    listed = heddle("adapters", "list", "--store", store, "--json").json["adapters"]
    assert [(it["id"], it["kind"], it["state"], it["durable"], it["root"]) for it in listed] == [
        ("one", "lora", "ready", True, str(one))
    ]
    assert listed[0]["revision"][:12] in added.out
    table = heddle("adapters", "list", "--store", store).out.splitlines()
    assert table[0].split() == ["name", "kind", "revision", "size", "state", "versions", "description"]
    assert table[1].split()[:3] == ["one", "lora", listed[0]["revision"][:12]]
    removed = heddle("adapters", "remove", "one", "--store", store, "--json")
    assert removed.status == 0 and removed.json["freed"]["disk_bytes"] > 0
    assert heddle("adapters", "list", "--store", store, "--json").json == {"adapters": [], "aliases": []}
    assert not list((store / "blobs").rglob("*/*"))
    assert heddle("adapters", "remove", "one", "--store", store).status == 1
    log = heddle("store", "log", "--store", store, "--json").json
    assert [(it["actor"], it["action"], it["name"]) for it in log] == [
        (actor(), "register", "one"), (actor(), "delete", "one")
    ]  # fmt: skip


def test_a_relative_path_is_taken_from_where_the_command_is_given(
    heddle: Heddle, store: Path, one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(one.parent)
    assert heddle("adapters", "add", "one", "one", "--store", store).status == 0


def test_an_adapter_in_a_hubs_cache_is_made_of_links(heddle: Heddle, store: Path, one: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    one.rename(tmp_path / "models--a--b" / "blobs")
    for file in (tmp_path / "models--a--b" / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert heddle("adapters", "add", "one", snapshot, "--store", store).status == 0
    stray = tmp_path / "stray"
    stray.mkdir()
    (stray / "adapter_config.json").symlink_to(snapshot / "adapter_config.json")
    refused = heddle("adapters", "add", "stray", stray, "--store", store)
    assert refused.status == 1 and "outside" in refused.err


def test_what_the_name_meant_before_still_resolves_until_it_is_collected(
    heddle: Heddle, store: Path, tmp_path: Path
) -> None:
    for number in range(8):
        again = ["--replace"] if number else []
        done = heddle("adapters", "add", "name", lora(tmp_path / f"v{number}"), *again, "--store", store)
        assert done.status == 0
    refused = heddle("adapters", "add", "name", tmp_path / "v0", "--store", store)
    assert refused.status == 1 and "taken by other weights" in refused.err
    (listed,) = heddle("adapters", "list", "--store", store, "--json").json["adapters"]
    assert len(listed["versions"]) == 8
    judged = heddle("adapters", "verify", "--store", store, "--json")
    assert judged.status == 0 and {it["revision"] for it in judged.json} == {
        it["revision"] for it in listed["versions"]
    }
    stray = store / "blobs" / "ab" / ("ab" * 32)
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"nobody's")
    collected = heddle("adapters", "gc", "--store", store, "--json").json
    assert collected["revisions"] == 2 and collected["disk_bytes"] > 8 and not stray.exists()
    assert len(heddle("adapters", "list", "--store", store, "--json").json["adapters"][0]["versions"]) == 6


def test_what_a_server_would_warn_of_is_told_once(heddle: Heddle, store: Path, tmp_path: Path) -> None:
    other = lora(tmp_path / "other", base_model_name_or_path="some/other")
    added = heddle("adapters", "add", "other", other, "--store", store, "--json")
    assert added.status == 0 and len(added.json["warnings"]) == 1
    assert added.err.count("some/other") == 1 and len(added.err.splitlines()) == 2


def test_aliases_are_listed(heddle: Heddle, store: Path, one: Path) -> None:
    heddle("adapters", "add", "one", one, "--store", store)
    with closing(open_store(store)) as opened:
        opened.commit(Change("alias", "both", alias=Alias("both", (Target("one", 0.5), Target("tiny", 2.0)), 5)), "me")
    assert heddle("adapters", "list", "--store", store).out.splitlines()[-1].split() == [
        "both", "one", "0.5,", "tiny", "2"
    ]  # fmt: skip
    refused = heddle("adapters", "remove", "one", "--store", store)
    assert refused.status == 1 and "alias 'both'" in refused.err


def test_what_strangers_wrote_does_not_reach_the_terminal(
    heddle: Heddle, store: Path, one: Path, tmp_path: Path
) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"description": "\x1b[31mred\u202e"}))
    added = heddle("adapters", "add", "one", one, "--manifest", manifest, "--store", store)
    assert added.status == 0 and added.out.isascii() and "\x1b" not in added.out and "red" in added.out
    listed = heddle("adapters", "list", "--store", store, "--json")
    assert listed.out.isascii() and listed.json["adapters"][0]["manifest"] == {"description": "\x1b[31mred\u202e"}


# -- damage ---


def test_a_damaged_blob_is_found_and_mended(heddle: Heddle, store: Path, one: Path, tmp_path: Path) -> None:
    heddle("adapters", "add", "one", one, "--store", store)
    blob = blob_of(store)
    heddle("adapters", "add", "two", lora(tmp_path / "two"), "--store", store)
    overwrite(blob)
    found = heddle("adapters", "verify", "--store", store, "--json")
    assert found.status == 1 and [(it["id"], it["state"]) for it in found.json] == [
        ("one", "quarantined"), ("two", "ready")
    ]  # fmt: skip
    assert "holds other bytes in the store than were stored" in found.json[0]["fault"]
    listed = heddle("adapters", "list", "--store", store, "--json").json["adapters"]
    assert [it["state"] for it in listed] == ["quarantined", "ready"]
    assert heddle("adapters", "verify", "two", "--store", store).status == 0
    overwrite(blob)  # the same bit again: it is sound
    assert heddle("adapters", "verify", "one", "--store", store).status == 0
    assert heddle("adapters", "list", "--store", store, "--json").json["adapters"][0]["state"] == "ready"
    blob.unlink()
    missing = heddle("adapters", "verify", "one", "--store", store)
    assert missing.status == 1 and "No such file" in missing.out
    assert heddle("adapters", "add", "one", one, "--store", store).status == 0  # registered again: mended
    assert heddle("adapters", "verify", "--store", store).status == 0
    actions = [it["action"] for it in heddle("store", "log", "--store", store, "--json").json]
    # that a file is missing is seen whenever the store is opened, so nobody needs to be told
    assert actions == ["register", "register", "quarantine", "check", "check"]


def test_what_a_comparison_found_is_not_undone_by_reading(heddle: Heddle, store: Path, one: Path) -> None:
    heddle("adapters", "add", "one", one, "--store", store)
    with closing(open_store(store)) as opened:
        registry = Registry(Catalog("tiny"), opened, True)
        registry.load()
        weights = msgspec.structs.replace(registry.catalog.find("one").weights, fault="its logits differ")
        opened.commit(registry.catalog.marked("one", weights), "server")
    found = heddle("adapters", "verify", "one", "--store", store, "--json")
    assert found.status == 1 and found.json[0]["fault"] == "its logits differ"


def test_one_that_is_not_there_does_not_keep_others_from_being_verified(heddle: Heddle, store: Path, one: Path) -> None:
    heddle("adapters", "add", "one", one, "--store", store)
    done = heddle("adapters", "verify", "none", "one", "--store", store, "--json")
    assert done.status == 1 and [it["state"] for it in done.json] == ["refused", "ready"]


def test_too_little_time_says_nothing_of_the_files(heddle: Heddle, store: Path, one: Path) -> None:
    heddle("adapters", "add", "one", one, "--store", store)
    done = heddle("adapters", "verify", "one", "--verify-timeout-s", "0", "--store", store)
    assert done.status == 70 and "more than 0 s" in done.err
    assert heddle("adapters", "list", "--store", store, "--json").json["adapters"][0]["state"] == "ready"


# -- what is refused ---


def test_adapters_that_do_not_fit_are_refused_in_a_line(heddle: Heddle, store: Path, one: Path, tmp_path: Path) -> None:
    edit_weights(one, lambda tensors: tensors.update(stray=next(iter(tensors.values())).clone()))
    for path in (one, tmp_path / "nowhere", store):
        refused = heddle("adapters", "add", "one", path, "--store", store)
        assert refused.status == 1 and refused.out == ""
        assert len(refused.err.splitlines()) == 2 and "Traceback" not in refused.err
    assert heddle("adapters", "add", "no/name", one, "--store", store).status == 1


@pytest.mark.parametrize(
    ("manifest", "status", "told"),
    [
        ({"base_id": "sha256:" + "0" * 64}, 1, "--model"),
        ({"chat_template": "{{ messages }}"}, 1, "--model"),
        ({"pinned": True}, 0, ""),
        ({"expires_at": 5}, 1, "has passed"),
        ({"colour": "red"}, 1, "unknown field"),
    ],
)
def test_manifests_are_checked_as_a_server_does(
    heddle: Heddle, store: Path, one: Path, tmp_path: Path, manifest: dict[str, object], status: int, told: str
) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(manifest))
    done = heddle("adapters", "add", "one", one, "--manifest", file, "--store", store)
    assert done.status == status and told in done.err


def test_the_kept_identity_of_the_base_is_compared(heddle: Heddle, store: Path, one: Path, tmp_path: Path) -> None:
    with closing(open_store(store)) as opened:
        opened.identify({"base_id": b"sha256:" + b"1" * 64})
    file = tmp_path / "manifest.json"
    for digit, status in (("1", 0), ("2", 1)):
        file.write_text(json.dumps({"base_id": "sha256:" + digit * 64}))
        done = heddle("adapters", "add", f"a{digit}", one, "--manifest", file, "--store", store)
        assert done.status == status


@pytest.mark.parametrize("text", ["{", "[]", '{"pinned": true, "pinned": false}'])
def test_a_manifest_that_is_none_is_refused(heddle: Heddle, store: Path, one: Path, tmp_path: Path, text: str) -> None:
    file = tmp_path / "manifest.json"
    file.write_text(text)
    assert heddle("adapters", "add", "one", one, "--manifest", file, "--store", store).status == 1
    file.unlink()
    missing = heddle("adapters", "add", "one", one, "--manifest", file, "--store", store)
    assert missing.status == 1 and "cannot be read" in missing.err


def test_a_comparison_takes_a_server(heddle: Heddle, store: Path, one: Path) -> None:
    refused = heddle("adapters", "add", "one", one, "--verify", "--store", store)
    assert refused.status == 1 and "start one" in refused.err


# -- stores that cannot be used ---


def test_a_store_that_is_none_is_not_made(heddle: Heddle, tmp_path: Path) -> None:
    done = heddle("adapters", "list", "--store", tmp_path / "none")
    assert done.status == 78 and "holds no store" in done.err and not (tmp_path / "none").exists()


def test_a_store_that_no_server_has_used(heddle: Heddle, tmp_path: Path) -> None:
    open_store(tmp_path / "store").close()
    done = heddle("adapters", "list", "--store", tmp_path / "store")
    assert done.status == 78 and "no server has used this store" in done.err


def test_a_damaged_or_newer_database(heddle: Heddle, store: Path) -> None:
    with closing(sqlite3.connect(store / DATABASE)) as database:
        database.execute("PRAGMA user_version = 99")
    for command in (("adapters", "list"), ("store", "log")):
        done = heddle(*command, "--store", store)
        assert done.status == 78 and "version 99" in done.err
    (store / DATABASE).write_bytes(b"no database" * 1000)
    for command in (("adapters", "list"), ("store", "log")):
        done = heddle(*command, "--store", store)
        assert done.status == 78 and "damaged" in done.err


def test_a_base_that_the_store_does_not_belong_to(heddle: Heddle, store: Path) -> None:
    with closing(open_store(store)) as opened:
        opened.identify({"fingerprint": b"0" * 64})
    done = heddle("adapters", "list", "--store", store, "--model", ROOT / "demo" / "base")
    assert done.status == 78 and "another base model" in done.err


def test_a_store_that_somebody_else_holds(heddle: Heddle, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.commands.reach._WAIT_S", 0.0)
    with closing(open_store(store)):
        done = heddle("adapters", "list", "--store", store)
        assert done.status == 70 and "in use" in done.err
        assert heddle("store", "log", "--store", store).status == 0  # reading takes no lock
        (store / "server.json").write_text('{"url": "http://127.0.0.1:9/v1", "pid": 1}')
        done = heddle("adapters", "list", "--store", store)
        assert done.status == 70 and "does not answer" in done.err
    assert heddle("adapters", "list", "--store", store).status == 0  # the lock says that no server has it
    assert not (store / "server.json").exists()


@pytest.mark.parametrize("arguments", [("--url", "127.0.0.1:8000"), ("--colour",), ("--store",)])
def test_usage(heddle: Heddle, arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        heddle("adapters", "list", *arguments)


def test_listing_starts_without_the_servers_libraries(store: Path) -> None:
    script = f"""
import sys
from server import cli
assert cli.main(["adapters", "list", "--store", {str(store)!r}]) == 0
print(sorted({{"torch", "transformers", "fastapi", "numpy", "rich", "tokenizers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_has_seen_enough(store: Path, one: Path) -> None:
    script = f"{sys.executable} -m server adapters list --store {store} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr and "Exception" not in done.stderr
