"""The census tells an adapter that is served exactly from one that is served wrongly."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from adapters_store.rules import Adapter
from tests.census import measure, page
from tests.census.by_peft import configured, lora
from tests.census.families import FAMILIES
from tests.census.format_makers import deeper
from tests.census.made import Made, Row, Section
from tests.census.measure import Bench, Cell
from tests.census.sections import SECTIONS
from tests.support.engine_harness import Engine

LLAMA = ("llama",)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, which a run of the census leaves out too
        yield Bench(FAMILIES["llama"], tmp_path / "llama")


def result(bench: Bench, row: Row, number: int = 0) -> str:
    return bench.measure("lora", number, row).result


def test_exact_refused_and_not_asked(bench: Bench) -> None:
    assert result(bench, Row("attention", lora(), LLAMA), 0) == "exact"
    refused = bench.measure("formats", 1, Row("a key", configured(a_key=2), LLAMA))
    assert (
        refused.result == "refused" and refused.message.startswith("a_key = 2") and page.names_remedy(refused.message)
    )
    assert result(bench, Row("deeper", deeper, LLAMA), 2) == "refused"
    assert result(bench, Row("of mixtures", lora(), ("mixtral",)), 3) == "n/a"


def test_another_scale_is_wrong(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_another_scale(engine: Engine, made: Made) -> Adapter:
        entry = read(engine, made)
        parts = tuple(replace(part, scale=1.5 * part.scale) for part in entry.package.parts)
        return replace(entry, package=replace(entry.package, parts=parts))

    read = measure.read
    monkeypatch.setattr(measure, "read", with_another_scale)
    cell = bench.measure("lora", 0, Row("attention", lora(), LLAMA))
    assert cell.result == "WRONG" and "of 5 prompts differ" in cell.message


def test_what_does_nothing_shows_nothing(bench: Bench) -> None:
    assert result(bench, Row("scale 0", lora(lora_alpha=0), LLAMA)) == "vacuous"


def test_where_only_a_refusal_is_right(bench: Bench) -> None:
    def without_truth(family: object, directory: Path) -> Made:
        return Made(lora()(FAMILIES["llama"], directory).path, None)

    assert result(bench, Row("attention", without_truth, LLAMA)) == "WRONG"


def test_what_peft_does_not_make(bench: Bench) -> None:
    assert result(bench, Row("no such linear", lora(target_modules=["w1"]), LLAMA)) == "PEFT cannot"


def test_the_page_is_made_of_the_cells(tmp_path: Path) -> None:
    rows = [Row("one", lora(), LLAMA), Row("two", lora(), LLAMA)]
    section = Section("lora", "A title", rows)
    cells = [Cell("lora", "one", "llama", "WRONG", "1 of 5 prompts differ"),
             Cell("lora", "two", "llama", "refused", "a = 2 is not served: remove the key")]  # fmt: skip
    file = tmp_path / "adapters.md"
    for _ in range(2):  # what stands around the table stays
        page.save(file, page.write([section], cells))
    text = file.read_text()
    assert text.count(page.BEGIN) == 1 and text.endswith("-->\n")
    assert "| one | **WRONG** |  |" in text and "| two | ref | 1 |" in text
    assert page.counts(cells) == {"refused": 1, "WRONG": 1}
    json.dumps(page.versions())


def test_rows_have_names_of_their_own() -> None:
    for section in SECTIONS:
        names = [row.name for row in section.rows]
        assert len(set(names)) == len(names), section.key
        assert all(set(row.families) <= set(FAMILIES) for row in section.rows)
