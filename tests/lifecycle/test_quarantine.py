"""What the engine gives up is in quarantine in the catalogue too, until it is registered again or found sound."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters_store.errors import AdapterQuarantined
from adapters_store.manifest import Manifest
from adapters_store.ref import AdapterRef
from server.engine.messages import AdapterChecked, AdapterMoved
from server.engine.request import Tier
from server.lifecycle.models import meaning_of
from tests.support.adapters_alone import Adapters, register, replace
from tests.support.waiting import soon

Runs = Callable[..., None]
WHY = "its outputs are not finite"


async def give_up(it: Adapters, model: str, reason: str | None = WHY) -> None:
    begin_to_give_up(it, it.catalog.find(model).ref, reason)
    await asyncio.gather(*it._tasks)


def begin_to_give_up(it: Adapters, ref: AdapterRef, reason: str | None = WHY) -> None:
    it.engine.given_up.add(ref)
    it.moved(AdapterMoved(ref, Tier.QUARANTINED, reason=reason))


def is_served(it: Adapters, *models: str) -> bool:
    """All of them, or none."""
    served = []
    for model in models:
        try:
            meaning_of(model, it.catalog)
            served.append(True)
        except AdapterQuarantined as error:
            assert "register it again" in str(error)
            served.append(False)
    assert len(set(served)) == 1, served
    return served[0]


def test_it_is_so_under_every_name_and_after_a_restart(run: Runs) -> None:
    async def before(it: Adapters) -> None:
        await register(it, "x", "a")
        await register(it, "y", "a")
        await register(it, "z", "b")
        await replace(it, "x", "c")
        await replace(it, "x", "a")
        await replace(it, "y", "b")  # which meant it before
        revision = it.catalog.find("x").ref.revision
        await give_up(it, "x")
        assert not is_served(it, "x", f"y@{revision}") and is_served(it, "y", "z")
        assert it.catalog.find("x").weights.fault == f"{WHY}: register it again"
        await give_up(it, "x", "another reason")
        log = it.registry.store.log()
        assert [(line.actor, line.details) for line in log if line.action == "quarantine"] == [
            ("the engine", f"{WHY}: register it again")
        ]

    async def after(it: Adapters) -> None:
        revision = it.catalog.find("x").ref.revision
        assert not is_served(it, "x", f"y@{revision}") and is_served(it, "y", "z")

    run(before)
    run(after)


def test_what_to_do_is_said_once(run: Runs) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        await give_up(it, "x", "its file changed; register the adapter again")
        assert it.catalog.find("x").weights.fault == "its file changed; register the adapter again"

    run(test)


def test_one_that_does_not_outlive_the_server_is_so_until_it_ends(run: Runs) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a", is_durable=False)
        await give_up(it, "x")
        assert not is_served(it, "x")
        await register(it, "x", "a", is_durable=False)
        assert is_served(it, "x")

    run(test)


def test_where_only_names_that_meant_it_are_left(run: Runs) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        ref = it.catalog.find("x").ref
        await replace(it, "x", "b")
        begin_to_give_up(it, ref)
        await asyncio.gather(*it._tasks)
        assert not is_served(it, f"x@{ref.revision}") and is_served(it, "x")
        await it.delete("x", "me")
        begin_to_give_up(it, ref)  # it was on its way
        await asyncio.gather(*it._tasks)
        await register(it, "x", "a")
        assert is_served(it, "x")

    run(test)


@pytest.mark.parametrize("tier", [tier for tier in Tier if tier is not Tier.QUARANTINED])
def test_nothing_else_that_the_engine_tells_changes_the_catalogue(run: Runs, tier: Tier) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        it.moved(AdapterMoved(it.catalog.find("x").ref, tier, reason="its load failed"))
        assert not it._tasks and is_served(it, "x")

    run(test)


@pytest.mark.parametrize("way", ["register", "replace", "another name", "another manifest"])
def test_registering_it_again_lifts_it_and_tells_the_engine(run: Runs, way: str) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        await give_up(it, "x")
        assert it.engine.told == [] and not is_served(it, "x")
        if way == "register":
            await register(it, "x", "a")
        elif way == "replace":
            await replace(it, "x", "a")
        elif way == "another name":
            await register(it, "y", "a")
        else:
            await replace(it, "x", "a", manifest=Manifest(pinned=True))
        assert is_served(it, "x") and it.engine.told == [it.catalog.find("x").ref]
        await register(it, "z", "a")
        assert len(it.engine.told) == 1  # there was nothing to lift

    run(test)


def test_what_the_engine_says_of_it_later_does_not_put_it_there_again(run: Runs) -> None:
    """When its last request has ended, say. It may not have heard of the registration then."""

    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        await give_up(it, "x")
        await register(it, "x", "a")
        await give_up(it, "x", reason=None)
        assert is_served(it, "x")

    run(test)


def test_one_that_the_engine_gave_up_while_no_name_meant_it_is_lifted_by_a_name(run: Runs) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        ref = it.catalog.find("x").ref
        lease = it.leases.take(ref, 1)
        deleting = asyncio.create_task(it.delete("x", "me"))
        await soon(lambda: "x" not in it.catalog)
        begin_to_give_up(it, ref)
        await asyncio.sleep(0.05)
        await register(it, "y", "a")
        assert is_served(it, "y") and it.engine.told == [ref] and not it.engine.given_up
        lease.end()
        await deleting

    run(test)


def test_a_registration_that_was_first_in_line_lifts_what_was_about_to_be_written(run: Runs) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        ref = it.catalog.find("x").ref
        async with it.registry._turn:  # another change is being written
            again = asyncio.create_task(register(it, "x", "a"))
            while not it.registry._turn._waiters:
                await asyncio.sleep(0)
            begin_to_give_up(it, ref)
        await asyncio.gather(again, *it._tasks)
        assert is_served(it, "x") is not (ref in it.engine.given_up)

    run(test)


def test_going_back_to_it_or_pinning_does_not_lift_it(run: Runs) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a", manifest=Manifest(pinned=True))
        ref = it.catalog.find("x").ref
        await replace(it, "x", "b")
        it.engine.told.clear()
        it.engine.given_up.add(ref)  # and the catalogue has not heard of it
        await it.roll_back("x", None, "me")
        assert it.engine.told == [] and ref in it.engine.given_up

    run(test)


def test_checking_one_that_is_sound_lifts_it(run: Runs, tmp_path: Path) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        await give_up(it, "x")
        assert (await it.check("x", "me")).weights.fault is None and is_served(it, "x")
        assert it.engine.told == [it.catalog.find("x").ref]  # before it was compared: it would not have looked at it

    run(test)


def test_what_cannot_be_compared_stays_and_is_mended_by_registering_it_again(run: Runs) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        await give_up(it, "x")
        it.engine.checked = AdapterChecked(0, None, error=f"the adapter 'x' is in quarantine: {WHY}")
        assert WHY in ((await it.check("x", "me")).weights.fault or "")
        await register(it, "x", "a")
        assert is_served(it, "x")

    run(test)


def test_one_that_the_engine_gives_up_while_it_is_checked_is_mended_so_too(run: Runs) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        ref = it.catalog.find("x").ref

        async def gives_up(*_: object) -> AdapterChecked:
            begin_to_give_up(it, ref)
            return AdapterChecked(0, None, error=f"the adapter 'x' is in quarantine: {WHY}")

        it.engine.check_adapter = gives_up  # type: ignore[method-assign, assignment]
        await it.check("x", "me")
        await asyncio.gather(*it._tasks)
        assert not is_served(it, "x")
        await register(it, "x", "a")
        assert is_served(it, "x")

    run(test)


def test_one_that_differs_from_merged_weights_stays_in_quarantine_for_that(run: Runs) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a")
        it.engine.checked = AdapterChecked(0, 9.0, 10.0)
        await it.check("x", "me")
        await give_up(it, "x")
        with pytest.raises(AdapterQuarantined, match="differ by up to 9"):
            await register(it, "x", "a")

    run(test)


def test_what_is_in_quarantine_is_not_brought_at_a_start_for_being_pinned(run: Runs) -> None:
    async def before(it: Adapters) -> None:
        for name, path in (("x", "a"), ("y", "b")):
            await register(it, name, path, manifest=Manifest(pinned=True))
        await give_up(it, "x")

    async def after(it: Adapters) -> None:
        it.tell_pinned()
        assert [ref.name for ref in it.engine.told] == ["y"]

    run(before)
    run(after)
