"""Two packages want the name `kernels`: ours, and a distribution that Transformers imports names from."""

import subprocess
import sys
from pathlib import Path

import pytest

from server.kernels_name import check_kernels_are_ours
from tests.support.breadth import always
from tests.support.live_server import ROOT

pytestmark = pytest.mark.slow
LOAD = """
import server.model
from tests.support.tiny_models import make_model
from kernels.lora import lora
print(type(make_model("qwen3_moe")).__name__)
"""


def install_distribution(site: Path, version: str, package: str | None = None) -> Path:
    """What an installed distribution looks like: metadata, and perhaps its package."""
    info = site / f"kernels-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    if package is not None:
        (site / "kernels").mkdir()
        (site / "kernels" / "__init__.py").write_text(package)
    return site


def run(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": ":".join(map(str, path)), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("version", always(["0.18.4", "99.0", "0.18.2", "0.1.0"], "0.18.4"))
def test_a_foreign_distribution_does_not_break_transformers(tmp_path: Path, version: str) -> None:
    """Its metadata is found, our package is imported: without our precaution 0.18.x fails in every model's import."""
    done = run(LOAD, ROOT, install_distribution(tmp_path, version))
    assert done.returncode == 0 and done.stdout.strip() == "Qwen3MoeForCausalLM", done.stderr


def test_the_precaution_is_needed(tmp_path: Path) -> None:
    """If this fails, Transformers has changed and server/kernels_name.py may be simpler."""
    bare = "import transformers.models.qwen3_moe.modeling_qwen3_moe"
    done = run(bare, ROOT, install_distribution(tmp_path, "0.18.2"))
    assert done.returncode != 0 and "kernels" in done.stderr


def test_ours_are_found_here() -> None:
    check_kernels_are_ours()


def test_a_package_that_hides_ours_is_reported(tmp_path: Path) -> None:
    site = install_distribution(tmp_path, "0.18.2", package="")
    code = """
from server.errors import ConfigError
from server.kernels_name import check_kernels_are_ours
try:
    check_kernels_are_ours()
except ConfigError as error:
    print(error.message)
"""
    done = run(code, site, ROOT)
    assert str(site / "kernels") in done.stdout and "pip uninstall kernels" in done.stdout, done.stderr
