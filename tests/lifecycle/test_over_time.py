"""What happens to adapters while others use them, without an engine."""

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from adapters_store.errors import (
    AdapterConflict,
    AdapterNotFound,
    InvalidManifest,
    RevisionChanged,
    StoreFailed,
)
from adapters_store.manifest import Manifest
from adapters_store.verify import verify
from server.errors import AdapterDeleted, HeddleError, TooManyOfAdapter
from server.lifecycle.models import meaning_of
from tests.support.adapter_files import lora
from tests.support.adapters_alone import Adapters, register, replace
from tests.support.waiting import soon

Test = Callable[[Adapters], Awaitable[None]]


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
        await soon(lambda: "x" not in it.catalog)
        assert not deleting.done() and it.engine.removed == []
        lease.end()
        assert (await deleting).disk_bytes > 0

        await register(it, "x", "a")
        lease = it.leases.take(ref, 1)
        lease.bind(lambda error: (ended.append(error), lease.end())[0])  # type: ignore[func-returns-value]
        start = time.monotonic()
        await it.delete("x", "me", drain_s=0.1)
        assert time.monotonic() - start >= 0.1
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
            await soon(lambda: "x" not in it.catalog)
            await register(it, "x", again)
            ended = list[HeddleError]()
            new = it.leases.take(it.catalog.find("x").ref, 1)
            new.bind(ended.append)
            await asyncio.wait_for(deleting, 60)
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
        await soon(lambda: "x" not in it.catalog)
        await register(it, "y", "a")
        second = it.leases.take(it.catalog.find("y").ref, 1)
        deleting.append(asyncio.create_task(it.delete("y", "me")))
        await soon(lambda: "y" not in it.catalog)
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
        await asyncio.wait_for(it.delete("x", "me", drain_s=0), 60)
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
        await soon(lambda: len(it.registry._turn._waiters or ()) == 2)
        registering.cancel()
        await asyncio.sleep(0.05)
        it.registry._turn.release()
        await collecting
        await asyncio.gather(registering, return_exceptions=True)
        await soon(lambda: "x" in it.catalog)
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
        await soon(lambda: "x" not in it.catalog)
        deleting.cancel()  # before it waits for the request
        await asyncio.sleep(0.05)
        lease.end()
        await soon(lambda: not list(it.registry.store.blobs.present()))
        assert len(it.engine.removed) == 1

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
