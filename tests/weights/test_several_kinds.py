"""Adapters with parts of several kinds: all of them are on the device, or none."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapters_store.parts import AdapterPackage, ExpertReplacement, LowRank
from adapters_store.ref import AdapterRef
from adapters_store.rules import Adapter
from kernels.adapter_rows import ShapeKey
from server.engine.residency import AdapterFailed, Wait
from server.model.probe import PROBE
from server.weights.arena import ArenaError
from server.weights.residency import DeviceResidency
from server.weights.tables.table import Prepared
from tests.support.engine_harness import Engine, prompts
from tests.support.stepped_residency import wait_until_resident
from tests.support.tiny_adapters import merge, register, save_esft, save_lora
from tests.support.tiny_models import make_model, reference


def both(engine: Engine, folder: Path) -> Adapter:
    """One adapter of the parts of two, which no format writes yet."""
    model = make_model("qwen3_moe")
    first = register(engine, save_lora(folder / "lora", model, 1, ("q_proj", "o_proj")))
    second = register(engine, save_esft(folder / "esft", model, 2, {1: [0, 5], 3: [2]}))
    parts = (*first.package.parts, *second.package.parts)
    files = (*first.package.files, *second.package.files)
    package = AdapterPackage("lora", "f" * 64, files, parts)
    entry = Adapter(AdapterRef("both", package.revision, "lora"), package)
    engine.register(entry.ref, entry.package)
    return entry


def test_they_all_act_and_beside_others(tmp_path: Path) -> None:
    engine = Engine(make_model("qwen3_moe", attention=PROBE))
    entry = both(engine, tmp_path)
    merged = make_model("qwen3_moe")
    for name in ("lora", "esft"):
        alone = register(engine, tmp_path / name)
        merge(merged, alone)
    answers = [engine.add(prompt, 8, ref) for prompt in prompts(4) for ref in (None, alone.ref, entry.ref)]
    engine.run()
    for answer in answers:
        if answer.adapter == entry.ref:
            assert answer.tokens == reference(merged, answer.prompt, 8)
    tables = engine.assembly.tables
    slot = wait_until_resident(engine.residency, entry)
    assert tables.lora.has(slot) and tables.experts.has(slot)
    assert engine.residency.shape_key(slot) == ShapeKey(rank=4, experts=1)
    engine.residency.release(entry.ref)
    engine.remove(entry.ref)
    assert not tables.lora.has(slot) and not tables.experts.has(slot)
    engine.residency.check()


class Full:
    """A table that takes whatever it is given until it is told to refuse."""

    kind = LowRank

    def __init__(self, kind: Any, refuses: str | None = None) -> None:
        self.kind, self._refuses = kind, refuses
        self.slots: set[int] = set()
        self.log: list[str] = []

    refusal = None

    def layout(self, parts: Sequence[Any]) -> "Full":
        return self

    def pages_for(self, layout: Any) -> int:
        return 0

    def map(self, slot: int, layout: Any) -> None:
        self.log.append("map")
        if self._refuses is not None:
            raise ArenaError(self._refuses)
        self.slots.add(slot)

    def prepare(self, slot: int) -> Prepared:
        self.log.append("prepare")
        return Prepared([])

    def install(self, slot: int) -> None:
        self.log.append("install")

    def unmap(self, slot: int) -> None:
        self.log.append("unmap")
        self.slots.remove(slot)

    def has(self, slot: int) -> bool:
        return slot in self.slots

    def shape_key(self, slot: int) -> ShapeKey:
        return ShapeKey()

    num_mapped_pages = 0

    def check(self) -> None: ...


@pytest.fixture
def residency(tmp_path: Path) -> Iterator[tuple[DeviceResidency, Adapter]]:
    engine = Engine(make_model("qwen3_moe", attention=PROBE))
    yield engine.residency, both(engine, tmp_path)


def test_where_one_table_cannot_take_its_part_the_others_give_theirs_back(
    residency: tuple[DeviceResidency, Adapter],
) -> None:
    it, entry = residency
    first, second = Full(LowRank), Full(ExpertReplacement, refuses="the driver is out of memory")
    it._tables = (first, second)
    for attempt in range(2):  # nothing stays behind that would be in the way of the second
        with pytest.raises(AdapterFailed, match="'both' could not be loaded: the driver is out of memory"):
            it.acquire(entry.ref)
        assert not first.slots and first.log == ["map", "unmap"] * (attempt + 1)
        it.check()
    assert it.report() == ()


def test_a_part_that_no_table_takes_is_refused_by_name(residency: tuple[DeviceResidency, Adapter]) -> None:
    it, entry = residency
    it._tables = (Full(LowRank),)
    with pytest.raises(AdapterFailed, match="this engine has no table for ExpertReplacement"):
        it.acquire(entry.ref)
    it.check()


def test_tables_are_installed_together_when_the_transfer_is_over(
    residency: tuple[DeviceResidency, Adapter],
) -> None:
    it, entry = residency
    tables = (Full(LowRank), Full(ExpertReplacement))
    it._tables = tables
    assert it.acquire(entry.ref) is Wait.LOADING
    assert all(table.log[0] == "map" and "install" not in table.log for table in tables)
    wait_until_resident(it, entry)
    assert all(table.log == ["map", "prepare", "install"] for table in tables)
    it.release(entry.ref)
    it.forget(entry.ref)
    assert all(table.log == ["map", "prepare", "install", "unmap"] for table in tables)


def test_several_adapters_at_once_are_refused_where_they_never_fit(tmp_path: Path) -> None:
    engine = Engine(make_model("llama", attention=PROBE), adapter_slots=2, adapter_bytes=1 << 16)
    model = make_model("llama")
    small, other, third = (register(engine, save_lora(tmp_path / f"s{i}", model, i, ("q_proj",))) for i in range(3))
    large = [register(engine, save_lora(tmp_path / f"l{i}", model, i, ("q_proj",), rank=18)) for i in range(2)]
    refusal = engine.residency.refusal
    assert refusal([]) is refusal([large[0].ref]) is refusal([small.ref, other.ref]) is None
    assert refusal([small.ref, other.ref, third.ref]) == (
        "the request needs 3 adapters at once; there are 2 slots (adapter_slots)"
    )
    told = str(refusal([it.ref for it in large]))
    assert "2 adapters together: it needs 73,728 bytes; all adapters together may use 65,536" in told
