"""What an adapter must pass before a name means it."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from adapters_store.errors import (
    AdapterError,
    AdapterQuarantined,
    InvalidManifest,
    UnsupportedAdapter,
    WrongBase,
)
from adapters_store.manifest import Manifest
from adapters_store.records import Target
from adapters_store.verifier import VerifierBusy, VerifierClosed
from server.engine.messages import AdapterChecked
from server.errors import HeddleError, NotFound, Overloaded, ShuttingDown
from server.lifecycle.models import meaning_of
from server.lifecycle.terms import Terms
from tests.support.adapter_files import lora
from tests.support.adapters_alone import Adapters, register, replace
from tests.support.waiting import soon

Test = Callable[[Adapters], Awaitable[None]]


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


@pytest.fixture
def an_hour_passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    now = time.time
    return lambda: monkeypatch.setattr(time, "time", lambda: now() + 3600)


def test_an_adapter_whose_time_has_come_is_not_found_and_then_deleted(
    run: Callable[..., None], an_hour_passes: Callable[[], None]
) -> None:
    async def test(it: Adapters) -> None:
        await register(it, "x", "a", manifest=Manifest(expires_at=int(time.time()) + 1000))
        expiring = asyncio.create_task(it.expire(every_s=0.02))
        await asyncio.sleep(0.1)
        assert meaning_of("x", it.catalog).label == "x"
        an_hour_passes()
        with pytest.raises(NotFound):
            meaning_of("x", it.catalog)
        await soon(lambda: it.deleted == ["x"])
        assert "x" not in it.catalog
        assert it.registry.store.log()[-1].actor == "expiry"
        expiring.cancel()

    run(test)


def test_one_that_expires_waits_for_no_other(
    run: Callable[..., None], caplog: pytest.LogCaptureFixture, an_hour_passes: Callable[[], None]
) -> None:
    async def test(it: Adapters) -> None:
        manifest = Manifest(expires_at=int(time.time()) + 1000)
        for name, path in (("busy", "a"), ("aliased", "b"), ("x", "c")):
            await register(it, name, path, manifest=manifest)
        await it.alias("y", (Target("aliased"),), "me")
        lease = it.leases.take(it.catalog.find("busy").ref, 1)
        expiring = asyncio.create_task(it.expire(every_s=0.02))
        an_hour_passes()
        await soon(lambda: "x" not in it.catalog and "busy" not in it.catalog and it.engine.removed)
        await asyncio.sleep(0.5)
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
