"""What happens to adapters while others use them, without an engine: server/lifecycle over a real store."""

import asyncio
import gc
import logging
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from adapters_store.errors import (
    AdapterConflict,
    AdapterError,
    AdapterNotFound,
    AdapterQuarantined,
    InvalidManifest,
    RevisionChanged,
    StoreFailed,
    UnsupportedAdapter,
    WrongBase,
)
from adapters_store.manifest import Manifest
from adapters_store.records import Target
from adapters_store.room import Room
from adapters_store.verifier import VerifierBusy, VerifierClosed
from adapters_store.verify import verify
from server.engine.messages import AdapterChecked
from server.errors import AdapterDeleted, HeddleError, NotFound, Overloaded, ShuttingDown, TooManyOfAdapter
from server.lifecycle.models import meaning_of
from server.lifecycle.terms import Terms
from tests.support.adapter_files import esft, lora
from tests.support.adapters_alone import Adapters, adapters

Test = Callable[[Adapters], Awaitable[None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Three adapters lie in a, b and c; `run(test)` gives the test a lifecycle over them."""
    lora(tmp_path / "a")
    lora(tmp_path / "b", lora_alpha=3)
    esft(tmp_path / "c", {1: [0]})

    def run(test: Test, **settings: Any) -> None:
        async def opened() -> None:
            async with adapters(tmp_path, **settings) as it:
                await test(it)

        asyncio.run(opened())

    return run


async def register(it: Adapters, name: str, path: str, **settings: Any) -> None:
    await it.register(it.wish(name, path, **settings), "me")


async def replace(it: Adapters, name: str, path: str, **settings: Any) -> None:
    await it.replace(it.wish(name, path, **settings), "me")


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


# -- while others use it ---


def test_a_request_keeps_the_weights_that_it_began_with(run: Callable[..., None]) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        meant = meaning_of("x", it.catalog)
        with it.leases.take(meant.ref, 1):
            for path in ("b", "c", "a", "b"):
                await replace(it, "x", path)
            assert await it.collect("me") == (0, 0)
            later = meaning_of("x", it.catalog)
            assert later.ref != meant.ref and it.registry.packed(meant.ref) is not None  # type: ignore[arg-type]
        deleting = asyncio.create_task(it.delete("x", "me"))
        await deleting
        with pytest.raises(StoreFailed):
            it.registry.packed(meant.ref)  # type: ignore[arg-type]

    run(test)


def test_deleting_waits_for_requests_and_not_longer_than_it_may(run: Callable[..., None]) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        ref = it.catalog.find("x").ref
        lease, ended = it.leases.take(ref, 1), list[HeddleError]()
        deleting = asyncio.create_task(it.delete("x", "me"))
        await asyncio.sleep(0.05)
        assert "x" not in it.catalog and not deleting.done() and it.engine.removed == []
        lease.end()
        assert (await deleting).disk_bytes > 0

        await register(it, "x", "a")
        lease = it.leases.take(ref, 1)
        lease.bind(lambda error: (ended.append(error), lease.end())[0])  # type: ignore[func-returns-value]
        start = time.monotonic()
        await it.delete("x", "me", drain_s=0.1)
        assert 0.1 <= time.monotonic() - start < 2
        assert isinstance(ended[0], AdapterDeleted) and "0.1 s were given" in ended[0].message

    run(test)


def test_who_deletes_waits_for_those_of_that_time_only(run: Callable[..., None]) -> None:
    """The name is given again, to other weights or the same, and is in use ever since."""

    async def test(it: Adapters) -> None:
        for again in ("b", "a"):
            await replace(it, "x", "a")
            old = it.leases.take(it.catalog.find("x").ref, 1)
            old.bind(lambda error: None)
            deleting = asyncio.create_task(it.delete("x", "me", drain_s=0.2))
            await asyncio.sleep(0.05)
            await register(it, "x", again)
            ended = list[HeddleError]()
            new = it.leases.take(it.catalog.find("x").ref, 1)
            new.bind(ended.append)
            await asyncio.wait_for(deleting, 5)
            assert ended == [] and it.leases.num_sequences("x") == 1
            assert it.registry.packed(it.catalog.find("x").ref)  # it is served
            new.end()
            await it.delete("x", "me")
        assert list(it.registry.store.blobs.present()) == []

    run(test)


def test_what_is_given_again_and_deleted_again_leaves_with_its_last_request(run: Callable[..., None]) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        ref = it.catalog.find("x").ref
        first = it.leases.take(ref, 1)
        deleting = [asyncio.create_task(it.delete("x", "me"))]
        await asyncio.sleep(0.05)
        await register(it, "y", "a")
        second = it.leases.take(it.catalog.find("y").ref, 1)
        deleting.append(asyncio.create_task(it.delete("y", "me")))
        await asyncio.sleep(0.05)
        first.end()
        await deleting[0]
        assert it.engine.removed == [] and it.registry.packed(ref)
        second.end()
        await deleting[1]
        assert len(it.engine.removed) == 1 and list(it.registry.store.blobs.present()) == []

    run(test)


def test_who_reads_slowly_holds_up_no_deletion_that_has_its_time(run: Callable[..., None]) -> None:
    """What it still has to read has been computed, and the rest is not."""

    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        lease, ended = it.leases.take(it.catalog.find("x").ref, 1), list[HeddleError]()
        lease.bind(ended.append)  # which does not end the lease
        await asyncio.wait_for(it.delete("x", "me", drain_s=0), 5)
        assert len(ended) == 1 and len(it.engine.removed) == 1

    run(test)


def test_what_is_refused_leaves_nothing_on_the_disk(run: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "c" / "heddle.json").write_text('{"expires_at": 1}')

    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        before = {blob.sha256 for blob in it.registry.store.blobs.present()}
        with pytest.raises(AdapterConflict):
            await register(it, "x", "b")
        with pytest.raises(InvalidManifest):
            await register(it, "y", "c")
        assert {blob.sha256 for blob in it.registry.store.blobs.present()} == before
        assert it.registry.packed(it.catalog.find("x").ref)

    run(test)


def test_what_a_killed_server_had_brought_goes_at_the_next_start(run: Callable[..., None], tmp_path: Path) -> None:
    async def before(it: Adapters) -> None:
        await register(it, "x", "a")
        with it.registry.store.blobs.desk() as desk:  # of a server that is killed before anything speaks of it
            verify(it.rules.job("b", desk=desk))

    async def after(it: Adapters) -> None:
        wanted = it.registry.store.journal.blobs()
        assert {blob.sha256 for blob in it.registry.store.blobs.present()} == set(wanted) != set()

    run(before)
    run(after)


def test_a_client_that_leaves_while_its_change_waits_loses_no_files(run: Callable[..., None]) -> None:
    async def test(it: Adapters) -> None:
        registering = asyncio.create_task(register(it, "x", "a"))
        while not it.registry._num_desks:
            await asyncio.sleep(0)
        await it.registry._turn.acquire()  # a slow disk, while the files are verified
        collecting = asyncio.create_task(it.registry.sweep())  # comes first
        await asyncio.sleep(0.3)
        registering.cancel()
        await asyncio.sleep(0.05)
        it.registry._turn.release()
        await collecting
        await asyncio.gather(registering, return_exceptions=True)
        await asyncio.sleep(0.1)
        missing = set(it.registry.store.journal.blobs()) - {blob.sha256 for blob in it.registry.store.blobs.present()}
        assert "x" in it.catalog and not missing

    run(test)


def test_a_refusal_that_nobody_waits_for_is_not_logged(
    run: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def test(it: Adapters) -> None:
        async with it.registry._turn:
            deleting = asyncio.create_task(it.delete("nothing", "me"))
            await asyncio.sleep(0.01)
            deleting.cancel()
        await asyncio.gather(deleting, return_exceptions=True)
        await asyncio.sleep(0.01)
        gc.collect()
        assert caplog.text == ""

    run(test)


def test_a_client_that_leaves_does_not_keep_what_it_deleted(run: Callable[..., None]) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        lease = it.leases.take(it.catalog.find("x").ref, 1)
        deleting = asyncio.create_task(it.delete("x", "me"))
        await asyncio.sleep(0.05)
        deleting.cancel()
        await asyncio.sleep(0.05)
        lease.end()
        for _ in range(100):
            await asyncio.sleep(0.01)
            if not list(it.registry.store.blobs.present()):
                break
        assert list(it.registry.store.blobs.present()) == [] and len(it.engine.removed) == 1

    run(test)


def test_no_more_sequences_of_a_name_than_its_manifest_allows(run: Callable[..., None]) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a", manifest=Manifest(max_concurrent=3))
        meant = meaning_of("x", it.catalog)
        first = it.leases.take(meant.ref, 2, meant.manifest.max_concurrent)
        with pytest.raises(TooManyOfAdapter, match="2 completions of 'x' are under way and 2 more were asked for"):
            it.leases.take(meant.ref, 2, 3)
        it.leases.take(meant.ref, 1, 3).end()
        first.end()
        first.end()
        it.leases.take(meant.ref, 3, 3).end()

    run(test)


# -- replacing ---


def test_of_many_who_replace_what_they_saw_one_wins(run: Callable[..., None]) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        seen = it.catalog.find("x").weights.revision
        wishes = [it.replace(it.wish("x", path), "me", seen[:12]) for path in "bcbcbc"]
        results = await asyncio.gather(*wishes, return_exceptions=True)
        assert sum(isinstance(result, RevisionChanged) for result in results) == 5
        with pytest.raises(RevisionChanged, match="'missing' means nothing"):
            await it.replace(it.wish("missing", "a"), "me", seen)

    run(test)


def test_of_many_who_register_one_name_one_wins(run: Callable[..., None]) -> None:
    async def test(it: Adapters) -> None:
        results = await asyncio.gather(
            *(it.register(it.wish("x", path), "me") for path in "abc" * 4), return_exceptions=True
        )
        settled = [result for result in results if not isinstance(result, BaseException)]
        assert len(settled) == 4 and sum(result.is_new for result in settled) == 1  # the others mean the very same
        assert all(isinstance(it, AdapterConflict) for it in results if isinstance(it, BaseException))
        it.catalog.check()

    run(test)


def test_collecting_frees_what_no_longer_resolves(run: Callable[..., None], tmp_path: Path) -> None:
    async def test(it: Adapters) -> None:
        for number in range(8):
            await replace(it, "x", lora(tmp_path / f"n{number}", lora_alpha=number + 1).name)
        first = it.catalog.get("x").versions[-1].revision
        num_gone, freed = await it.collect("me")
        assert num_gone == 2 and freed > 0 and len(it.catalog.get("x").versions) == 6
        with pytest.raises(AdapterNotFound):
            it.catalog.find(f"x@{first[:12]}")
        assert not it.registry.store.has(first) and await it.collect("me") == (0, 0)

    run(test)


# -- what is demanded ---


@pytest.mark.parametrize(
    ("manifest", "kind", "says"),
    [
        (Manifest(base_id="sha256:" + "1" * 64), WrongBase, "this server's base is sha256:000"),
        (Manifest(expires_at=1), InvalidManifest, "expires_at is 1, which has passed"),
        (Manifest(pinned=True), InvalidManifest, "pinned may be at most 0 of together 10 bytes"),
    ],
)
def test_a_manifest_that_cannot_be_kept_is_refused(
    run: Callable[..., None], manifest: Manifest, kind: type[AdapterError], says: str
) -> None:
    async def test(it: Adapters) -> None:
        with pytest.raises(kind, match=says):
            await register(it, "x", "a", manifest=manifest)
        assert list(it.catalog) == [] and it.registry.store.load().records == []

    run(test, terms=Terms(("base",), False, 1e-3, 10, 0, None))


def test_a_manifest_may_lie_with_the_files_and_a_request_may_bring_another(
    run: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "a" / "heddle.json").write_text('{"description": "in the directory", "sampling": {"temperature": 0}}')
    (tmp_path / "c" / "heddle.json").write_text('{"unknown": 1}')

    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        manifest = it.catalog.find("x").version.manifest
        assert (manifest.description, manifest.sampling.temperature) == ("in the directory", 0)
        await register(it, "y", "a", manifest=Manifest(description="brought"))
        assert it.catalog.find("y").version.manifest == Manifest(description="brought")
        assert it.catalog.find("x").ref == it.catalog.find("y").ref
        with pytest.raises(InvalidManifest, match="heddle.json: Object contains unknown field `unknown`"):
            await register(it, "z", "c")

    run(test)


def test_no_way_leads_to_more_pins_than_there_is_room_for(run: Callable[..., None]) -> None:
    pinned = Manifest(pinned=True)

    async def test(it: Adapters) -> None:
        both = await asyncio.gather(
            register(it, "x", "a", manifest=pinned), register(it, "y", "b", manifest=pinned), return_exceptions=True
        )
        assert [type(error) for error in both if error is not None] == [InvalidManifest]
        name = "x" if both[0] is None else "y"
        await replace(it, name, "c")
        await register(it, "z", "b", manifest=pinned)
        with pytest.raises(InvalidManifest, match="pinned may be at most 1"):
            await it.roll_back(name, None, "me")
        assert it.means(name) == "c"

    run(test, terms=Terms(("base",), False, 1e-3, 1 << 30, 1, None))


def test_what_is_pinned_is_told_to_the_engine_at_once_and_at_the_next_start(run: Callable[..., None]) -> None:
    async def before(it: Adapters) -> None:
        await register(it, "x", "a", manifest=Manifest(pinned=True))
        assert [ref.name for ref in it.engine.told] == ["x"]
        assert it.registry.packed(it.engine.told[0]).pinned
        await register(it, "y", "c")
        assert len(it.engine.told) == 1

    async def after(it: Adapters) -> None:
        it.tell_pinned()
        assert [ref.name for ref in it.engine.told] == ["x"]
        await replace(it, "x", "b")
        assert not it.registry.packed(it.catalog.find("x").ref).pinned

    run(before)
    run(after)


def test_an_adapter_whose_time_has_come_is_not_found_and_then_deleted(run: Callable[..., None]) -> None:
    async def test(it: Adapters) -> None:
        now = time.time()
        await register(it, "x", "a", manifest=Manifest(expires_at=int(now) + 2))
        assert meaning_of("x", it.catalog).label == "x"
        expiring = asyncio.create_task(it.expire(every_s=0.05))
        while time.time() < int(now) + 2.5:
            await asyncio.sleep(0.05)
        with pytest.raises(NotFound):
            meaning_of("x", it.catalog)
        assert "x" not in it.catalog and it.deleted == ["x"]
        assert it.registry.store.log()[-1].actor == "expiry"
        expiring.cancel()

    run(test)


def test_one_that_expires_waits_for_no_other(run: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    async def test(it: Adapters) -> None:
        soon = Manifest(expires_at=int(time.time()) + 2)
        for name, path in (("busy", "a"), ("aliased", "b"), ("x", "c")):
            await register(it, name, path, manifest=soon)
        await it.alias("y", (Target("aliased"),), "me")
        lease = it.leases.take(it.catalog.find("busy").ref, 1)
        expiring = asyncio.create_task(it.expire(every_s=0.02))
        await asyncio.sleep(2.5)
        assert "x" not in it.catalog and "busy" not in it.catalog and it.engine.removed != []
        assert caplog.text.count("cannot be deleted") == 1  # and not once a second, for ever
        expiring.cancel()
        lease.end()

    run(test)


def test_a_strict_server_refuses_what_was_trained_on_another_base(run: Callable[..., None], tmp_path: Path) -> None:
    lora(tmp_path / "d", base_model_name_or_path="org/Other")

    async def test(it: Adapters) -> None:
        with pytest.raises(UnsupportedAdapter, match="--strict-base"):
            await register(it, "x", "d")

    run(test, terms=Terms(("base",), True, 1e-3, 1 << 30, 4, None))


def test_a_higher_rank_than_decodes_were_captured_for_is_said(
    run: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    async def test(it: Adapters) -> None:
        with caplog.at_level(logging.WARNING):
            await register(it, "x", "a")
        (warning,) = it.inspection.warnings_for(it.catalog.find("x"))
        assert "is above 0" in warning and "--max-rank 2" in warning
        assert f"adapter x: {warning}" in caplog.text

    run(test, terms=Terms(("base",), False, 1e-3, 1 << 30, 4, 0))


# -- compared with merged weights ---


@pytest.mark.parametrize(
    ("checked", "says"),
    [
        (AdapterChecked(0, 0.02, 10.0), "differ by up to 0.02 .* at most 0.01 is allowed"),
        (AdapterChecked(0, None, error="no room"), "could not be compared with merged weights: no room"),
    ],
)
def test_what_differs_from_merged_weights_is_in_quarantine(
    run: Callable[..., None], checked: AdapterChecked, says: str
) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "sound", "b", verify=True)
        parity = it.catalog.find("sound").weights.parity
        assert parity is not None and (parity.max_difference, parity.bound) == (1e-6, 5e-3)
        it.engine.checked = checked
        with pytest.raises(AdapterQuarantined, match=says):
            await register(it, "x", "a", verify=True)
        with pytest.raises(AdapterQuarantined, match=says):
            meaning_of("x", it.catalog)
        with pytest.raises(AdapterQuarantined, match=f"{says}.*; 'sound' means what it did before"):
            await it.replace(it.wish("sound", "c", verify=True), "me")
        assert it.means("sound") == "b" == meaning_of("sound", it.catalog).ref.name.replace("sound", "b")  # type: ignore[union-attr]
        it.engine.checked = AdapterChecked(0, 1e-6, 10.0)
        await it.check("x", "me")
        assert meaning_of("x", it.catalog).label == "x"

    run(test)


# -- what is the server's own lack ---


@pytest.mark.parametrize(("raised", "told"), [(VerifierBusy, Overloaded), (VerifierClosed, ShuttingDown)])
def test_what_cannot_be_verified_now_is_the_servers_lack(
    run: Callable[..., None], raised: type[Exception], told: type[HeddleError]
) -> None:
    class Refusing:
        async def verify(self, job: object) -> None:
            raise raised

    async def test(it: Adapters) -> None:
        with pytest.raises(told) as error:
            await register(it, "x", "a")
        assert error.value.status == 503

    run(test, verifier=Refusing())


# -- aliases ---


def test_an_alias_divides_its_requests_by_weight_and_a_user_stays(run: Callable[..., None]) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        await register(it, "y", "b")
        await it.alias("z", (Target("x", 0.9), Target("y", 0.1)), "me")
        drawn = [meaning_of("z", it.catalog).model for _ in range(4000)]
        assert 0.07 < drawn.count("y") / 4000 < 0.13
        by_user = {str(user): meaning_of("z", it.catalog, str(user)).model for user in range(2000)}
        assert by_user == {user: meaning_of("z", it.catalog, user).model for user in by_user}
        assert 0.07 < list(by_user.values()).count("y") / 2000 < 0.13
        await it.alias("z", (Target("x", 0.8), Target("y", 0.2)), "me")
        moved = {user: meaning_of("z", it.catalog, user).model for user, was in by_user.items()}
        assert all(moved[user] == "y" for user, was in by_user.items() if was == "y")  # only the new tenth moves

    run(test)


def test_a_target_that_cannot_be_served_leaves_its_share_to_the_others(run: Callable[..., None]) -> None:
    async def test(it: Adapters) -> None:
        it.engine.checked = AdapterChecked(0, 1.0, 1.0)
        with pytest.raises(AdapterQuarantined):
            await register(it, "x", "a", verify=True)
        await it.alias("z", (Target("x", 1e6), Target("base", 1)), "me")
        assert meaning_of("z", it.catalog).model == "base"
        await it.alias("z", (Target("x"),), "me")
        with pytest.raises(AdapterQuarantined):
            meaning_of("z", it.catalog)

    run(test)
