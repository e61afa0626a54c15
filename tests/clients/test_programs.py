"""The clients' programs without the clients: that they can be read, and how a program's functions become checks."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import clients
from clients.environments import Program, programs_in
from clients.table import read

FOLDER = Path(clients.__file__).parent
PROGRAMS = programs_in(FOLDER / "programs")
MADE_UP = '''
# dependencies = ["pytest"]
import asyncio


def _helps():
    """no check"""


def good():
    """one thing,
    in two lines"""


async def later():
    """another."""
    await asyncio.sleep(0)


def bad():
    """a third"""
    assert 1 == 2, "one is not two"


def leaves():
    """a fourth"""
    raise SystemExit(3)


def last():
    """a fifth"""
'''


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda it: it.path.name)
def test_a_program_says_what_it_needs_and_can_be_read(program: Program) -> None:
    assert program.package
    text = program.path.read_text()
    if program.is_node:
        assert "export const checks = {" in text
        return
    functions = [it for it in ast.parse(text).body if isinstance(it, ast.FunctionDef | ast.AsyncFunctionDef)]
    checks = [it for it in functions if not it.name.startswith("_")]
    assert checks
    for it in checks:
        assert ast.get_docstring(it), f"{it.name} does not say what it shows, and would not run"
        assert not it.args.args, f"{it.name} is called with nothing"


def test_no_two_programs_have_one_room() -> None:
    assert len({it.name for it in PROGRAMS}) == len(PROGRAMS)


def run(tmp_path: Path, text: str) -> Path:
    program, results = tmp_path / "program.py", tmp_path / "results.jsonl"
    program.write_text(text)
    subprocess.run(
        [sys.executable, "-P", str(FOLDER / "checks.py"), str(program), Program(program).package, str(results)],
        timeout=60, capture_output=True,
    )  # fmt: skip
    return results


def test_functions_become_checks_and_a_failure_hides_nothing(tmp_path: Path) -> None:
    shown = read(run(tmp_path, MADE_UP), "pytest", "program.py")
    assert shown.problem is None and shown.version == pytest.__version__
    assert [it.what for it in shown.checks] == ["one thing, in two lines", "another", "a third", "a fourth", "a fifth"]
    good, later, bad, leaves, last = shown.checks
    assert good.problem is None and later.problem is None and last.problem is None
    assert bad.problem is not None and bad.problem.startswith("AssertionError: one is not two in line 22: assert 1")
    assert leaves.problem is not None and leaves.problem.startswith("SystemExit: 3")


def test_a_client_that_cannot_be_imported_is_a_failure(tmp_path: Path) -> None:
    shown = read(run(tmp_path, f"{MADE_UP}\nimport nowhere_to_be_found\n"), "pytest", "program.py")
    assert shown.problems == ["the program did not come to its end"] and shown.version == pytest.__version__


def test_a_program_without_a_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import nothing\n")
    with pytest.raises(ValueError, match="does not say what it needs"):
        _ = Program(tmp_path / "program.py").needs
