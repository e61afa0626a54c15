"""A store on a disk that nobody may write: at the start, and from some moment on."""

import asyncio
import logging
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import StoreFailed
from server.config import EngineConfig, ServerConfig
from server.lifecycle.wish import Wish, source_path
from server.run_directory import RunDirectory
from server.storage import choose_store
from tests.support.catalogue_driver import lifecycle_over
from tests.support.distinct_adapters import save_distinct, save_small
from tests.support.kill_loops import inspect
from tests.support.tiny_models import make_config

LINEAR = "model.layers.0.self_attn.q_proj"
BASE = BaseSpec("tiny", {LINEAR: (8, 8)}, {})


@contextmanager
def made_so(do: list[str], undo: list[str], what: str) -> Iterator[None]:
    try:
        done = subprocess.run(do, capture_output=True)
    except FileNotFoundError:
        pytest.skip(f"this machine has no {do[0]}, to make {what}")
    if done.returncode:
        pytest.skip(f"this machine lets nobody make {what}: {done.stderr.decode(errors='replace').strip()}")
    try:
        yield
    finally:
        subprocess.run(undo, check=True)


def test_a_store_that_is_read_only_at_the_start_is_replaced_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, store = tmp_path / "tiny", tmp_path / "store"
    make_config("llama").save_pretrained(model)
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    config = ServerConfig(EngineConfig(str(model)), store=str(store))
    with RunDirectory() as run:
        own, is_durable = choose_store(config, run)
        own.close()
        assert is_durable
    before = inspect(store)
    bind, read_only = ["mount", "--bind", str(store), str(store)], ["mount", "-o", "remount,bind,ro", str(store)]
    unmount = ["umount", str(store)]
    with made_so(bind, unmount, "a mount"), made_so(read_only, ["true"], "a read-only mount"), RunDirectory() as run:
        with caplog.at_level(logging.WARNING):
            other, is_durable = choose_store(config, run)
        assert not is_durable and other.directory.is_relative_to(run.path)
        other.close()
    assert "Read-only file system" in caplog.text and "are forgotten when the server ends" in caplog.text
    assert inspect(store) == before


def test_a_database_that_becomes_read_only(tmp_path: Path) -> None:
    paths = save_distinct(tmp_path / "adapters", save_small(tmp_path / "like", LINEAR, 8, 8), 2)
    log = str(tmp_path / "store" / "catalog.sqlite-wal")

    async def run() -> None:
        lifecycle = lifecycle_over(tmp_path / "store", BASE, tmp_path / "adapters")
        wishes = [
            Wish(name, source_path(lifecycle.inspection.rules, str(path)))
            for name, path in zip("xy", paths, strict=True)
        ]
        await lifecycle.register(wishes[0], "test")
        with made_so(["chattr", "+i", log], ["chattr", "-i", log], "a file that root may not write"):
            try:
                await lifecycle.register(wishes[1], "test")
            except StoreFailed as error:
                assert "could not be written" in str(error) and "nothing has changed" in str(error)
            else:
                pytest.skip("this file system writes to files that may not be written, if they are open")
            with pytest.raises(StoreFailed):
                await lifecycle.delete("x", "test")
            assert [record.name for record in lifecycle.catalog] == ["x"]
            lifecycle.catalog.check()
        await lifecycle.register(wishes[1], "test")
        await lifecycle.registry.close()

    asyncio.run(run())
    assert set(inspect(tmp_path / "store")[0]) == {"x", "y"}
