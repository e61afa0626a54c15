"""What a change answers while others change the same name: what it did itself. No engine, no HTTP."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import AdapterQuarantined
from adapters_store.records import Parity
from server.lifecycle.lifecycle import Lifecycle
from server.lifecycle.registry import Changed
from server.lifecycle.wish import Wish, source_path
from tests.support.catalogue_driver import lifecycle_over
from tests.support.distinct_adapters import save_distinct, save_small

LINEAR = "model.layers.0.self_attn.q_proj"
BASE = BaseSpec("tiny", {LINEAR: (8, 8)}, {})


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return save_distinct(tmp_path / "adapters", save_small(tmp_path / "like", LINEAR, 8, 8), 3)


def wish(lifecycle: Lifecycle, path: Path, name: str = "x") -> Wish:
    return Wish(name, source_path(lifecycle.inspection.rules, str(path)))


def over(tmp_path: Path, work: Callable[[Lifecycle], Awaitable[None]]) -> None:
    async def run() -> None:
        lifecycle = lifecycle_over(tmp_path / "store", BASE, tmp_path / "adapters")
        try:
            await work(lifecycle)
        finally:
            await lifecycle.stop()
            await lifecycle.registry.close()

    asyncio.run(run())


def let_others_in(lifecycle: Lifecycle, other: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on another change is made after each, before its caller goes on."""
    change = lifecycle.registry.change

    async def and_another(*args: Any, **kwargs: Any) -> Changed:
        done = await change(*args, **kwargs)
        await change(other, "another client")
        return done

    monkeypatch.setattr(lifecycle.registry, "change", and_another)


def test_a_registration_says_what_it_registered_though_it_is_deleted_meanwhile(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(lifecycle: Lifecycle) -> None:
        let_others_in(lifecycle, lambda: lifecycle.catalog.removed("x"), monkeypatch)
        for change in (lifecycle.register, lifecycle.replace):
            settled = await change(wish(lifecycle, paths[0]), "test")
            assert settled.is_new and settled.found.record.name == "x" and len(settled.found.record.versions) == 1
            assert "x" not in lifecycle.catalog

    over(tmp_path, work)


def test_a_rollback_says_what_it_went_back_to_though_that_is_rolled_back_meanwhile(
    tmp_path: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(lifecycle: Lifecycle) -> None:
        first = (await lifecycle.register(wish(lifecycle, paths[0]), "test")).found.ref.revision
        await lifecycle.replace(wish(lifecycle, paths[1]), "test")
        let_others_in(lifecycle, lambda: lifecycle.catalog.rolled_back("x", None, 1), monkeypatch)
        assert (await lifecycle.roll_back("x", None, "test")).ref.revision == first
        assert lifecycle.catalog.find("x").ref.revision != first

    over(tmp_path, work)


def test_of_many_that_give_a_free_name_one_has_made_it(tmp_path: Path, paths: list[Path]) -> None:
    async def work(lifecycle: Lifecycle) -> None:
        settled = await asyncio.gather(*(lifecycle.replace(wish(lifecycle, path), "test") for path in paths * 3))
        assert sum(it.is_new for it in settled) == 1

    over(tmp_path, work)


def test_what_a_damaged_copy_put_in_quarantine_is_served_again_when_it_is_registered_again(
    tmp_path: Path, paths: list[Path]
) -> None:
    async def register(lifecycle: Lifecycle) -> None:
        await lifecycle.register(wish(lifecycle, paths[0]), "test")
        blobs = lifecycle.registry.store.blobs
        weights = max(blobs.present(), key=lambda it: it.size)
        os.truncate(blobs.root / weights.path, weights.size - 1)

    async def mend(lifecycle: Lifecycle) -> None:
        assert "register it again" in (lifecycle.catalog.find("x").weights.fault or "")
        settled = await lifecycle.register(wish(lifecycle, paths[0]), "test")
        assert not settled.is_new and settled.found.weights.fault is None
        assert lifecycle.catalog.find("x").weights.fault is None

    async def look_again(lifecycle: Lifecycle) -> None:
        assert lifecycle.catalog.find("x").weights.fault is None

    for work in (register, mend, look_again):
        over(tmp_path, work)


def test_what_compared_badly_stays_in_quarantine_whatever_it_is_called(tmp_path: Path, paths: list[Path]) -> None:
    async def work(lifecycle: Lifecycle) -> None:
        weights = (await lifecycle.register(wish(lifecycle, paths[0]), "test")).found.weights
        bad = msgspec.structs.replace(weights, fault="its logits differ", parity=Parity(1.0, 0.1, 4.0, 16, 0))
        await lifecycle.registry.change(lambda: lifecycle.catalog.marked("x", bad), "test")
        for name, change in (("x", lifecycle.register), ("y", lifecycle.register), ("z", lifecycle.replace)):
            with pytest.raises(AdapterQuarantined, match="its logits differ"):
                await change(wish(lifecycle, paths[0], name), "test")
            assert lifecycle.catalog.find(name).weights == bad
        good = (await lifecycle.register(wish(lifecycle, paths[1], "w"), "test")).found.ref
        with pytest.raises(AdapterQuarantined, match="'w' means what it did before"):
            await lifecycle.replace(wish(lifecycle, paths[0], "w"), "test")
        assert lifecycle.catalog.find("w").ref == good

    over(tmp_path, work)
