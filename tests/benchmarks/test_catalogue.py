"""The benchmark of the catalogue runs, and its exchanged answers are such as a checker must refuse."""

import random

import pytest

from benchmarks.catalogue import TAMPERED, table, tampered
from tests.support.commands import run
from tests.support.linearizability import Operation, unexplained


def test_an_exchanged_answer_is_found() -> None:
    history = [
        Operation("x", "register", "a", begin=0, end=1, status=201, seen=("a",)),
        Operation("x", "read", begin=2, end=3, status=200, seen=("a",)),
        Operation("x", "replace", "b", begin=4, end=5, status=200, seen=("b", "a")),
        Operation("x", "read", begin=6, end=7, status=200, seen=("b", "a")),
    ]
    copies = list(tampered(history, random.Random(0)))
    assert not unexplained(history) and len(copies) == TAMPERED and all(map(unexplained, copies))


def test_its_table() -> None:
    assert table([("a", "1"), ("b", "2")]).splitlines()[2:] == ["| a | 1 |", "| b | 2 |"]


@pytest.mark.slow
def test_it_counts_what_it_kills() -> None:
    done = run("-m", "benchmarks.catalogue", "--only", "kills", "--loops", "4", "--server-loops", "0")
    assert done.returncode == 0 and "| 4 loops, " in done.stdout and "**lost 0**" in done.stdout, done.stderr
