"""The plug-ins that pyproject.toml declares, installed or not."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
Install = Callable[[dict[str, str]], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Declare plug-ins as an installed distribution would, for processes that are started from now on."""

    def write(plug_ins: dict[str, str]) -> None:
        written = tmp_path / "installed" / "plug_ins-1.dist-info"
        written.mkdir(parents=True)
        (written / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-ins\nVersion: 1\n")
        lines = "".join(f"{name} = {value}\n" for name, value in plug_ins.items())
        (written / "entry_points.txt").write_text(f"[heddle.adapter_sources]\n{lines}")
        monkeypatch.setenv("PYTHONPATH", str(written.parent))

    return write


@pytest.fixture
def ours(install: Install) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    install(project["entry-points"]["heddle.adapter_sources"])
