"""A wheel that brings compiled kernels: they run where there is no compiler, and where there is one it compiles."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.support.commands import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not shutil.which("c++"), reason="nothing to compile with"),
]

RUN = """
import torch, kernels.host
from pathlib import Path
from kernels.rms_norm import rms_norm
print(Path(kernels.__file__).resolve())
print(kernels.host.status())
x, weight = torch.randn(3, 40), torch.randn(40)
with kernels.host.references_only():
    wanted = rms_norm(x, weight, 1e-6)
assert kernels.host.takes(x)
torch.testing.assert_close(rms_norm(x, weight, 1e-6), wanted)
"""


def test_wheel(tmp_path: Path) -> None:
    """Unpacked beside this environment's packages, as an installation without dependencies is."""
    copy = tmp_path / "source"
    left_out = shutil.ignore_patterns("tests", "benchmarks", "docs", ".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    build = copy / "kernels" / "host" / "build.py"
    assert '"-O3"' in build.read_text()
    build.write_text(build.read_text().replace('"-O3"', '"-O0"'))  # a third of the time, of three builds
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)]
    environment = os.environ | {"HEDDLE_PREBUILT": "1"}
    built = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    shutil.copytree(next((tmp_path / "unpacked").glob("*.data")) / "purelib", installed)
    without = tmp_path / "without-a-compiler"
    without.mkdir()
    first, brought = run_in(installed, tmp_path / "a", PATH=str(without))
    assert Path(first).is_relative_to(installed) and brought.startswith("brought by the wheel, for ")
    first, compiled = run_in(installed, tmp_path / "b")
    assert Path(first).is_relative_to(installed) and compiled.startswith("built with ")


def run_in(installed: Path, cache: Path, **environment: str) -> list[str]:
    """What RUN prints, with the installed packages before all others."""
    others = str(Path(torch.__file__).resolve().parents[1])
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CXX")}
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=cache.parent, capture_output=True, text=True,
        env=inherited | {"PYTHONPATH": f"{installed}:{others}", "XDG_CACHE_HOME": str(cache)} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
