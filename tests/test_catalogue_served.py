"""The catalogue of a whole server: many clients at once, a disk that is full, read-only or damaged."""

import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.distinct_adapters import save_distinct, save_small
from tests.support.linearizability import Operation, unexplained
from tests.support.live_server import LiveServer, write_tokenizer
from tests.support.recorded_clients import at_once, record, revisions_served
from tests.support.tiny_models import make_config, save_model

pytestmark = pytest.mark.slow
LINEAR = "model.layers.0.self_attn.q_proj"
STORE_BYTES = 16 << 20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("catalogue")
    width = make_config("llama").hidden_size
    write_tokenizer(save_model(root / "tiny", "llama", vocab_size=256))
    save_distinct(root / "adapters", save_small(root / "like", LINEAR, width, width), 24)
    return root


@pytest.fixture(scope="module")
def store(root: Path) -> Iterator[Path]:
    """On a small disk of its own, where this machine lets us have one."""
    directory = root / "store"
    directory.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={STORE_BYTES}", "tmpfs", str(directory)]
    is_mounted = _does("mount", *options)
    yield directory
    if is_mounted:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.fixture(scope="module")
def server(root: Path, store: Path) -> Iterator[LiveServer]:
    server = LiveServer(str(root / "tiny"), "--adapter-root", str(root / "adapters"), "--store", str(store),
                        "--adapter-slots", "2", log=root / "log").wait_ready()  # fmt: skip
    yield server
    assert server.stop() == 0, server.output()
    assert "Traceback" not in server.output()


@pytest.fixture(scope="module")
def paths(root: Path, server: LiveServer) -> dict[str, str]:
    """By revision."""
    return revisions_served(server.url, {it.name: it.name for it in sorted((root / "adapters").iterdir())})


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def _does(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


# -- many at once -----------------------------------------------------------


def test_of_twenty_that_register_one_name_one_wins(server: LiveServer, paths: dict[str, str]) -> None:
    answered = at_once(server.url, [Operation("wanted", "register", it) for it in list(paths)[:20]], paths)
    assert Counter(it.status for it in answered) == {201: 1, 409: 19}
    [winner] = [it for it in answered if it.status == 201]
    assert winner.seen == (winner.revision,)
    assert httpx.get(f"{server.url}/v1/adapters/wanted").json()["revision"] == winner.revision
    assert not unexplained(answered)


def test_of_twenty_that_swap_one_revision_one_wins(
    server: LiveServer, paths: dict[str, str], http: httpx.Client
) -> None:
    first, *others = list(paths)[:21]
    assert http.put("/v1/adapters/swapped", json={"path": paths[first]}).status_code == 201
    swaps = [Operation("swapped", "replace", it, expected=first) for it in others]
    answered = at_once(server.url, swaps, paths)
    assert Counter(it.status for it in answered) == {200: 1, 412: 19}
    [winner] = [it for it in answered if it.status == 200]
    told = http.get("/v1/adapters/swapped").json()["versions"]
    assert [it["revision"] for it in told] == [winner.revision, first]


def test_what_many_clients_see_could_have_happened_one_by_one(server: LiveServer, paths: dict[str, str]) -> None:
    few = dict(list(paths.items())[:5])
    history = record(server.url, num_clients=6, seconds=2.0, names=["a", "b"], paths=few)
    assert not unexplained(history)
    kinds = Counter((it.kind, it.status) for it in history)
    for expected in (("register", 201), ("replace", 200), ("replace", 412), ("rollback", 200), ("delete", 200),
                     ("read", 404)):  # fmt: skip
        assert kinds[expected], kinds
    assert {status for _, status in kinds} <= {200, 201, 404, 409, 412}, kinds


# -- disks -----------------------------------------------------------


@pytest.fixture
def small_disk(store: Path) -> Path:
    if shutil.disk_usage(store).total > 2 * STORE_BYTES:
        pytest.skip("this machine lets nobody mount a small disk")
    return store


@contextmanager
def full(disk: Path, but: int) -> Iterator[None]:
    """Nothing left of it but so many bytes."""
    filler = disk / "filler"
    try:
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - but)
        yield
    finally:
        filler.unlink()


def listed(http: httpx.Client) -> dict[str, object]:
    """What every name means and meant."""
    data = http.get("/v1/adapters", params={"limit": 1000}).json()["data"]
    return {it["id"]: it["versions"] for it in data}


def answers(http: httpx.Client, model: str) -> httpx.Response:
    return http.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 4, "temperature": 0})


def test_a_disk_that_is_full_when_files_are_copied(
    small_disk: Path, http: httpx.Client, root: Path, paths: dict[str, str]
) -> None:
    http.put("/v1/adapters/old", json={"path": "d0"})
    before, said = listed(http), answers(http, "old").json()["choices"]
    fresh = root / "adapters" / "fresh"
    shutil.copytree(root / "adapters" / "d0", fresh)
    file = fresh / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\x00\x00\x00\x3f")
    with full(small_disk, but=0):
        for refused in (http.post("/v1/adapters", json={"name": "new", "path": "fresh"}),
                        http.put("/v1/adapters/old", json={"path": "fresh"})):  # fmt: skip
            assert refused.status_code == 507 and refused.json()["error"]["code"] == "store_full", refused.text
            assert "room" in refused.json()["error"]["message"]
        assert listed(http) == before and answers(http, "new").status_code == 404
        assert answers(http, "old").json()["choices"] == said
        assert not list((small_disk / "incoming").iterdir())
    assert http.post("/v1/adapters", json={"name": "new", "path": "fresh"}).status_code == 201
    assert answers(http, "new").status_code == 200


def test_a_disk_that_is_full_when_a_change_is_written(
    small_disk: Path, http: httpx.Client, paths: dict[str, str]
) -> None:
    """The blobs are there already, under another name; the database wants to grow."""
    http.put("/v1/adapters/there", json={"path": "d1"})
    with full(small_disk, but=0):
        before, outcomes = listed(http), []
        for number in range(2000):  # the database has some room in the files that it has
            outcomes.append(http.post("/v1/adapters", json={"name": f"more-{number}", "path": "d1"}))
            if outcomes[-1].status_code != 201:
                break
        refused = outcomes[-1]
        assert refused.status_code == 507 and refused.json()["error"]["code"] == "store_full", refused.text
        assert "nothing has changed" in refused.json()["error"]["message"]
        assert len(listed(http)) == len(before) + len(outcomes) - 1
        assert answers(http, f"more-{len(outcomes) - 1}").status_code == 404
        assert answers(http, "there").status_code == 200
        deleted = http.delete("/v1/adapters/there").status_code  # it is written too, if there is room for so much
        assert (deleted, answers(http, "there").status_code) in ((200, 404), (507, 200))
        assert http.get("/health").status_code == 200
    assert http.post("/v1/adapters", json={"name": f"more-{len(outcomes) - 1}", "path": "d1"}).status_code == 201


@contextmanager
def unchangeable(*places: Path) -> Iterator[None]:
    """Nobody may write these, not even root."""
    try:
        for place in places:
            if not _does("chattr", "+i", str(place)):
                pytest.skip("this machine has no files that root may not write")
        yield
    finally:
        for place in places:
            _does("chattr", "-i", str(place))


def test_a_store_that_becomes_read_only(store: Path, http: httpx.Client, paths: dict[str, str]) -> None:
    http.put("/v1/adapters/kept", json={"path": "d2"})
    before = listed(http)
    with unchangeable(store / "incoming"):
        refused = http.post("/v1/adapters", json={"name": "late", "path": "d3"})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "store_failed", refused.text
        assert "cannot be written" in refused.json()["error"]["message"]
        assert listed(http) == before and answers(http, "kept").status_code == 200
        assert http.get("/health").status_code == 200
    assert http.post("/v1/adapters", json={"name": "late", "path": "d3"}).status_code == 201


def test_a_damaged_copy_fails_its_own_requests_until_it_is_registered_again(
    store: Path, http: httpx.Client, root: Path, paths: dict[str, str]
) -> None:
    for name, path in (("sound", "d4"), ("damaged", "d5"), ("other", "d6"), ("another", "d7")):
        assert http.put(f"/v1/adapters/{name}", json={"path": path}).status_code in (200, 201)
    said = answers(http, "damaged").json()["choices"]
    for name in ("sound", "other", "another"):  # two slots: it has left the device
        assert answers(http, name).status_code == 200
    assert _settled(http, "damaged") == "absent"
    weights = next(
        blob for blob in (store / "blobs").rglob("*")
        if blob.is_file() and blob.read_bytes() == (root / "adapters" / "d5" / "adapter_model.safetensors").read_bytes()
    )  # fmt: skip
    weights.chmod(0o600)
    with weights.open("r+b") as file:
        file.seek(-40, os.SEEK_END)
        [byte] = file.read(1)
        file.seek(-40, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    failed = answers(http, "damaged")
    assert failed.status_code == 422 and failed.json()["error"]["code"] == "adapter_quarantined", failed.text
    assert "adapter_model.safetensors changed after it was registered" in failed.json()["error"]["message"]
    assert all(answers(http, name).status_code == 200 for name in ("sound", "other", "another", "tiny"))
    assert http.post("/v1/adapters", json={"name": "damaged", "path": "d5"}).status_code == 200
    assert answers(http, "damaged").json()["choices"] == said


def _settled(http: httpx.Client, name: str) -> str:
    """The engine tells what is on the device now and then."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        state = str(http.get(f"/v1/adapters/{name}").json()["device"]["state"])
        if state == "absent":
            break
        time.sleep(0.05)
    return state
