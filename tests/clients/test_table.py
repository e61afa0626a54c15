"""What programs found becomes a table, also where something failed or broke off."""

from pathlib import Path

import pytest

from clients.table import BEGIN, END, Check, Shown, put, read, summary, whole

LINES = (
    '{"version": "1.2"}\n{"what": "chat", "problem": null, "seconds": 0.5}\n'
    '{"what": "streams", "problem": "ValueError: a | b\\nand more", "seconds": 1}\n'
)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def test_what_was_found_is_read(results: Path) -> None:
    results.write_text(LINES + '{"ended": true}\n')
    shown = read(results, "client", "program.py")
    assert shown.version == "1.2" and shown.problem is None
    assert shown.checks == [Check("chat", None, 0.5), Check("streams", "ValueError: a | b\nand more", 1)]
    assert shown.problems == ["streams: ValueError: a | b\nand more"]


@pytest.mark.parametrize("end", ["", '{"what": "thi'])
def test_a_program_that_broke_off_has_failed_and_what_it_found_is_kept(results: Path, end: str) -> None:
    results.write_text(LINES + end)
    shown = read(results, "client", "program.py")
    assert [it.what for it in shown.checks] == ["chat", "streams"]
    assert shown.problem == "the program did not come to its end"
    assert read(results, "client", "program.py", "killed").problem == "killed"


def test_nothing_found_is_a_failure(results: Path) -> None:
    assert read(results, "client", "program.py").problem == "the program did not come to its end"
    results.write_text('{"version": "1"}\n{"ended": true}\n')
    assert read(results, "client", "program.py").problem == "the program has no checks"


def test_a_row_a_client() -> None:
    good = Shown("one", "one.py", "1.0", [Check("chat"), Check("streams")])
    bad = Shown("two", "two.py", "2.0", [Check("chat"), Check("streams", "a | b\nc")])
    none = Shown("three", "three.py", "unknown", problem="npm is missing")
    assert summary([good, bad, none]).splitlines()[2:] == [
        "| [one](clients/programs/one.py) | 1.0 | all 2 |",
        "| [two](clients/programs/two.py) | 2.0 | **1 of 2**; streams: a \\| b c |",
        "| [three](clients/programs/three.py) | unknown | **nothing ran**; npm is missing |",
    ]
    assert "| streams | a \\| b c | 0.0 |" in whole([bad])
    assert "npm is missing" in whole([none])


def test_it_is_put_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    put(page, "new")
    put(page, "newer")
    assert page.read_text() == f"before\n{BEGIN}\nnewer\n{END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="has no"):
        put(page, "new")
