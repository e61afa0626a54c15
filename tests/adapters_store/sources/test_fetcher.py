"""Adapters from a hub and an object store that this machine plays, fetched by processes that can be killed."""

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from adapters_store.errors import (
    AdapterError,
    InvalidAdapter,
    SourceFailed,
    SourceNotFound,
    SourceRefused,
    UnsupportedAdapter,
    UploadTooLarge,
)
from adapters_store.sources import FetchLimits
from adapters_store.sources.allowed import parse_allowed
from adapters_store.sources.fetcher import Fetcher, FetcherBusy, FetcherClosed
from adapters_store.uploads import Uploads
from tests.adapters_store.sources.conftest import Install
from tests.support.remote_doubles import COMMIT, Double, hub, object_store

FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w" * 5000}
MORE = {"README.md": b"#", "optimizer.pt": b"p", "sub/adapter_model.safetensors": b"s", ".gitattributes": b"g"}
ALLOWED = parse_allowed(["hub:org/*", "s3:bucket/**", "own:**"])
LIMITS = FetchLimits(max_bytes=100_000, max_files=5)
TOKEN = "hf_secretsecretsecretsecret"


@pytest.fixture(autouse=True)
def environment(ours: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def the_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    with hub(FILES | MORE) as double:
        monkeypatch.setenv("HF_ENDPOINT", double.url)
        yield double


@pytest.fixture
def the_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    pytest.importorskip("boto3", reason="boto3 is the extra s3")
    with object_store(FILES | MORE) as double:
        monkeypatch.setenv("AWS_ENDPOINT_URL", double.url)
        yield double


def children() -> list[psutil.Process]:
    return [it for it in psutil.Process().children() if "adapters_store.sources.fetch" in it.cmdline()]


def run(test: Callable[[Fetcher], Coroutine[Any, Any, None]], timeout_s: float = 30, **options: int) -> None:
    async def body() -> None:
        fetcher = Fetcher(ALLOWED, LIMITS, timeout_s, **options)
        try:
            await test(fetcher)
        finally:
            await fetcher.close()
        assert children() == []

    asyncio.run(body())


def fetch(reference: str, into: Path, timeout_s: float = 30) -> str:
    resolved = []

    async def test(fetcher: Fetcher) -> None:
        resolved.append((await fetcher.fetch(reference, into)).resolved)

    into.mkdir(exist_ok=True)
    run(test, timeout_s)
    return resolved[0]


def refusal(reference: str, into: Path, kind: type[AdapterError], double: Double, timeout_s: float = 30) -> str:
    with pytest.raises(kind) as raised:
        fetch(reference, into, timeout_s)
    assert type(raised.value) is kind
    said = str(raised.value)
    assert TOKEN not in said and "127.0.0.1" not in said and "://" not in said and double.url not in said
    return said


def read(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("revision", ["", "@v1", f"@{COMMIT}"])
def test_a_hubs_adapter_is_fetched_at_one_commit(tmp_path: Path, the_hub: Double, revision: str) -> None:
    assert fetch(f"hub:org/name{revision}", tmp_path / "a") == f"org/name@{COMMIT}"
    assert read(tmp_path / "a") == FILES  # and nothing of what else the repository has
    assert sorted(the_hub.downloads()) == sorted(f"GET /org/name/resolve/{COMMIT}/{name}" for name in FILES)
    assert the_hub.tokens == {f"Bearer {TOKEN}"}


def test_what_a_hub_has_not(tmp_path: Path, the_hub: Double) -> None:
    assert "org/nothing" in refusal("hub:org/nothing", tmp_path / "a", SourceNotFound, the_hub)
    refusal("hub:org/name@v2", tmp_path / "a", SourceNotFound, the_hub)
    assert read(tmp_path / "a") == {}


def test_what_is_not_allowed_is_refused_before_anybody_is_asked(tmp_path: Path, the_hub: Double) -> None:
    for reference in ("hub:evil/name", "hub:org/name/../x", "s4:org/name"):
        refusal(reference, tmp_path / "a", SourceRefused, the_hub)
    assert the_hub.asked == []


def test_a_hub_that_leads_to_another_repository_is_not_followed(tmp_path: Path, the_hub: Double) -> None:
    the_hub.id = "evil/name"
    refusal("hub:org/name", tmp_path / "a", SourceRefused, the_hub)
    assert the_hub.downloads() == []


def test_sizes_are_asked_before_bytes(tmp_path: Path, the_hub: Double) -> None:
    the_hub.sizes = {"adapter_model.safetensors": 99_999}
    assert "100,001 bytes; at most 100,000" in refusal("hub:org/name", tmp_path / "a", UploadTooLarge, the_hub)
    for number in range(5):
        the_hub.files[f"adapter_model-{number}.safetensors"] = b""
    the_hub.sizes = {}
    assert "7 files; at most 5" in refusal("hub:org/name", tmp_path / "a", UploadTooLarge, the_hub)
    assert the_hub.downloads() == [] and read(tmp_path / "a") == {}


def test_a_hub_that_sends_more_than_it_said_is_stopped(tmp_path: Path, the_hub: Double) -> None:
    the_hub.files["adapter_model.safetensors"] = b"w" * 300_000
    the_hub.sizes = {"adapter_model.safetensors": 10}
    refusal("hub:org/name", tmp_path / "a", UploadTooLarge, the_hub)
    assert all(path.stat().st_size <= LIMITS.max_bytes for path in (tmp_path / "a").rglob("*"))


def test_pickles_are_refused_unread(tmp_path: Path, the_hub: Double) -> None:
    the_hub.files = {"adapter_config.json": b"{}", "adapter_model.bin": b"p", "training_args.bin": b"p"}
    said = refusal("hub:org/name", tmp_path / "a", UnsupportedAdapter, the_hub)
    assert "adapter_model.bin" in said and "save as safetensors" in said
    the_hub.files = {"README.md": b"#"}
    refusal("hub:org/name", tmp_path / "a", InvalidAdapter, the_hub)
    assert the_hub.downloads() == []


def test_offline_is_said_clearly(tmp_path: Path, the_hub: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE=1" in refusal("hub:org/name", tmp_path / "a", SourceFailed, the_hub)
    assert the_hub.asked == []


def test_no_token_is_taken_from_elsewhere(tmp_path: Path, the_hub: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(TOKEN)
    fetch("hub:org/name", tmp_path / "a")
    assert the_hub.tokens == {None}


def test_a_slow_hub_is_given_up_in_time(tmp_path: Path, the_hub: Double) -> None:
    the_hub.delay_s = 5
    assert "took more than 4 s" in refusal("hub:org/name", tmp_path / "a", SourceFailed, the_hub, timeout_s=4)


def test_closing_and_leaving_end_the_process(tmp_path: Path, the_hub: Double) -> None:
    the_hub.delay_s = 5

    async def test(fetcher: Fetcher) -> None:
        leaving, staying, waiting = (
            asyncio.create_task(fetcher.fetch("hub:org/name", tmp_path / name)) for name in ("a", "b", "c")
        )
        await asyncio.sleep(0)
        with pytest.raises(FetcherBusy):
            await fetcher.fetch("hub:org/name", tmp_path)
        while len(children()) < 2:
            await asyncio.sleep(0.02)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await fetcher.close()
        ended = await asyncio.gather(staying, waiting, return_exceptions=True)
        assert [type(it) for it in ended] == [FetcherClosed, FetcherClosed] and children() == []

    for name in "abc":
        (tmp_path / name).mkdir()
    run(test, max_waiting=1)


def test_an_adapter_becomes_an_upload_or_nothing(tmp_path: Path, the_hub: Double) -> None:
    async def test(fetcher: Fetcher) -> None:
        uploads = Uploads(tmp_path / "uploads")
        upload_id, fetched = await fetcher.fetch_as_upload("hub:org/name", uploads)
        assert fetched.resolved == f"org/name@{COMMIT}"
        assert (await uploads.get(upload_id)).files == {name: len(data) for name, data in FILES.items()}
        for reference in ("hub:org/nothing", "hub:evil/name"):
            with pytest.raises(AdapterError):
                await fetcher.fetch_as_upload(reference, uploads)
        assert os.listdir(tmp_path / "uploads") == [upload_id]
        uploads.close()

    run(test)


def test_an_object_stores_adapter(tmp_path: Path, the_store: Double) -> None:
    resolved = fetch("s3:bucket/team/a", tmp_path / "a")
    place, _, revision = resolved.partition("@")
    assert place == "bucket/team/a" and len(revision) == 40
    assert read(tmp_path / "a") == FILES
    the_store.files["adapter_config.json"] = b"[]"
    assert fetch("s3:bucket/team/a", tmp_path / "b") != resolved


def test_what_an_object_store_has_not_or_may_not_send(tmp_path: Path, the_store: Double) -> None:
    refusal("s3:bucket/team/b", tmp_path / "a", SourceNotFound, the_store)
    refusal("s3:bucket/te", tmp_path / "a", SourceNotFound, the_store)
    refusal("s3:other/team/a", tmp_path / "a", SourceRefused, the_store)
    refusal("s3:bucket/team/a@v1", tmp_path / "a", SourceRefused, the_store)
    the_store.sizes = {"adapter_model.safetensors": 100_000}
    refusal("s3:bucket/team/a", tmp_path / "a", UploadTooLarge, the_store)
    assert the_store.downloads() == []
    the_store.sizes = {"adapter_model.safetensors": 10}
    assert "another size" in refusal("s3:bucket/team/a", tmp_path / "a", SourceFailed, the_store)
    the_store.files = {"adapter_model.bin": b"p"}
    refusal("s3:bucket/team/a", tmp_path / "b", UnsupportedAdapter, the_store)


PLUG_IN = """
import os
class Own:
    def fetch(self, reference, into, limits):
        print("this is no answer")
        if reference == "dies":
            os._exit(3)
        raise RuntimeError("https://user:secret@host/path?sig=1 failed")
"""


def test_a_plug_in_of_somebody_else(
    tmp_path: Path, the_hub: Double, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    assert "no plug-in for own:" in refusal("own:x", tmp_path / "a", SourceFailed, the_hub)
    (tmp_path / "installed" / "own.py").write_text(PLUG_IN)
    entry_points = tmp_path / "installed" / "plug_ins-1.dist-info" / "entry_points.txt"
    entry_points.write_text("[heddle.adapter_sources]\nown = own:Own\n")
    with caplog.at_level(logging.ERROR, "heddle.adapters"):
        assert "(RuntimeError)" in refusal("own:x", tmp_path / "a", SourceFailed, the_hub)
        assert "RuntimeError: <address> failed" in caplog.text and "secret" not in caplog.text
        assert "ended the process" in refusal("own:dies", tmp_path / "a", SourceFailed, the_hub)
