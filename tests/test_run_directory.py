"""What a server has for as long as it lives is gone with it, however it ends."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from adapters_store.store.store import open_store
from server.errors import StartupError
from server.run_directory import RunDirectory

KILLED = "import os; from server.run_directory import RunDirectory; print(RunDirectory().path, flush=True); os.kill(os.getpid(), 9)"  # noqa: E501


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_it_is_private_and_gone_afterwards(place: Path) -> None:
    with RunDirectory() as run:
        (run.path / "store").mkdir()
        assert run.path.stat().st_mode & 0o777 == 0o700
    assert os.listdir(place) == []


def test_the_next_start_removes_what_a_killed_one_left_and_nothing_else(place: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, check=False)
    left = Path(killed.stdout.strip())
    assert killed.returncode == -9 and left.is_dir() and left.parent == place
    (place / "heddle-of-another").mkdir()  # no lock: not ours
    with RunDirectory() as first:
        assert not left.exists()
        with RunDirectory() as second:  # beside one that lives
            assert first.path.is_dir() and second.path.is_dir()
    assert os.listdir(place) == ["heddle-of-another"]


@pytest.mark.parametrize("name", ["heddle-store", "heddle-run-my_store"])
def test_a_store_that_somebody_keeps_there_stays(place: Path, name: str) -> None:
    """It has a lock, and while no server runs it is free."""
    open_store(place / name).close()
    with RunDirectory():
        pass
    assert os.listdir(place) == [name] and (place / name / "catalog.sqlite").is_file()


def test_no_place_is_a_clear_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(place / "missing"))
    with pytest.raises(StartupError, match="no directory can be made below"):
        RunDirectory()
