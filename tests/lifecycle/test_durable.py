"""What outlives the server, and what the disk has lost or changed: a lifecycle over a real store."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from adapters_store.errors import (
    AdapterQuarantined,
)
from adapters_store.manifest import Manifest
from adapters_store.records import Target
from adapters_store.room import Room
from server.lifecycle.models import meaning_of
from tests.support.adapters_alone import Adapters, register, replace

Test = Callable[[Adapters], Awaitable[None]]


# -- durable ---


def test_a_restart_brings_back_names_their_versions_and_aliases(run: Callable[..., None], tmp_path: Path) -> None:
    async def before(it: Adapters) -> None:
        await register(it, "x", "a", manifest=Manifest(description="first"))
        await replace(it, "x", "b")
        await register(it, "passing", "c", is_durable=False)
        await it.alias("y", (Target("x", 0.5), Target("base", 0.5)), "me")

    async def after(it: Adapters) -> None:
        assert [record.name for record in it.catalog] == ["x"] and it.means("x") == "b"
        alias = it.catalog.alias("y")
        assert alias is not None and len(alias.targets) == 2
        await it.roll_back("x", None, "me")
        assert it.means("x") == "a" and it.catalog.find("x").version.manifest.description == "first"
        for line in it.registry.store.log():
            assert line.actor == "me"
        assert [it.action for it in it.registry.store.log()] == ["register", "replace", "alias", "rollback"]

    run(before)
    for name in "ab":
        shutil.rmtree(tmp_path / name)  # what is served is our own
    run(after)


def test_what_the_disk_lost_is_in_quarantine_and_mended_by_registering_it_again(
    run: Callable[..., None], tmp_path: Path
) -> None:
    async def before(it: Adapters) -> None:
        await register(it, "x", "a")
        await register(it, "y", "c")

    async def after(it: Adapters) -> None:
        with pytest.raises(AdapterQuarantined, match="in quarantine: .* cannot be read from the store"):
            meaning_of("x", it.catalog)
        assert meaning_of("y", it.catalog).label == "y"
        await replace(it, "x", "a")
        assert meaning_of("x", it.catalog).label == "x"

    run(before)
    for blob in (tmp_path / "store" / "blobs").glob("*/*"):
        if blob.read_bytes() == (tmp_path / "a" / "adapter_model.safetensors").read_bytes():
            blob.unlink()
    run(after)


def test_checking_reads_every_byte_out_of_the_store(run: Callable[..., None], tmp_path: Path) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        sound = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
        (blob,) = [blob for blob in (tmp_path / "store" / "blobs").glob("*/*") if blob.read_bytes() == sound]
        blob.chmod(0o600)
        blob.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        assert "not what was stored" in ((await it.check("x", "me")).weights.fault or "")
        blob.write_bytes(sound[:-1])
        assert "register it again" in ((await it.check("x", "me")).weights.fault or "")
        blob.write_bytes(sound)
        assert (await it.check("x", "me")).weights.fault is None
        blob.unlink()
        assert "register it again" in ((await it.check("x", "me")).weights.fault or "")
        await replace(it, "x", "a")
        assert it.catalog.find("x").weights.fault is None and blob.read_bytes() == sound
        told = [it.action for it in it.registry.store.log()]
        assert told == ["register", "quarantine", "quarantine", "check", "quarantine", "check"]

    run(test)


def test_when_requests_fail_the_files_are_looked_at(run: Callable[..., None], tmp_path: Path) -> None:
    async def settled(it: Adapters) -> None:
        await asyncio.gather(*it._tasks)

    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        ref = it.catalog.find("x").ref
        it.suspect(ref)
        await settled(it)
        assert meaning_of("x", it.catalog).ref == ref  # nothing was wrong with them
        sound = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
        (blob,) = [blob for blob in (tmp_path / "store" / "blobs").glob("*/*") if blob.read_bytes() == sound]
        blob.chmod(0o600)
        blob.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        it.suspect(ref)
        await settled(it)
        assert meaning_of("x", it.catalog).ref == ref  # they are not read for every request
        it._suspected.clear()
        it.suspect(ref)
        await settled(it)
        with pytest.raises(AdapterQuarantined, match="holds other bytes in the store than were stored: register it"):
            meaning_of("x", it.catalog)
        await replace(it, "x", "a")
        assert meaning_of("x", it.catalog).ref == ref

    run(test)


def test_what_an_older_heddle_read_is_read_again(run: Callable[..., None], tmp_path: Path) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a", manifest=Manifest(description="kept"))
        await replace(it, "x", "c")
        before = await it.registry.content(it.catalog.find("x").weights.revision)
        await it.read_again()
        assert it.means("x") == "c" and len(it.catalog.get("x").versions) == 2
        assert await it.registry.content(it.catalog.find("x").weights.revision) == before
        it.rules.room = Room(10, 4, 0)
        await it.read_again()
        for model in ("x", f"x@{it.catalog.get('x').versions[1].revision}"):
            with pytest.raises(AdapterQuarantined, match="all adapters together may use 10"):
                meaning_of(model, it.catalog)

    run(test)


def test_one_set_of_weights_is_stored_once_whatever_it_is_called(run: Callable[..., None], tmp_path: Path) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        blobs = {blob.sha256 for blob in it.registry.store.blobs.present()}
        await register(it, "y", "a")
        assert {blob.sha256 for blob in it.registry.store.blobs.present()} == blobs
        assert it.catalog.find("x").ref == it.catalog.find("y").ref
        assert (await it.delete("x", "me")).disk_bytes == 0 and it.engine.removed == []
        freed = await it.delete("y", "me")
        assert freed.disk_bytes > 0 and freed.device_bytes == 100 and len(it.engine.removed) == 1
        assert list(it.registry.store.blobs.present()) == []

    run(test)
