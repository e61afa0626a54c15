"""`heddle base-id`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters_store.base_id import base_id
from tests.support.commands import ROOT

Heddle = Callable[..., Any]


def test_the_identity_is_printed_alone(heddle: Heddle) -> None:
    done = heddle("base-id", ROOT / "demo" / "base")
    assert (done.status, done.err) == (0, "") and done.out == base_id(ROOT / "demo" / "base") + "\n"


def test_what_is_no_base_is_said_in_a_line(heddle: Heddle, tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        done = heddle("base-id", directory)
        assert done.status == 78 and done.out == "" and len(done.err.splitlines()) == 1
