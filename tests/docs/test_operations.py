"""docs/operations.md names every exit status and every environment variable of the code."""

import re

import pytest

from server.exits import EXIT_CONFIG, EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED_EARLY
from tests.support.live_server import ROOT

PAGE = (ROOT / "docs" / "operations.md").read_text()
READ = re.compile(r"""environ(?:\.\w+\(|\[)\s*["']([A-Z][A-Z0-9_]+)["']|environ \| \{["']([A-Z][A-Z0-9_]+)""")
HANDED_ON = re.compile(r'^\s+"([A-Z][A-Z0-9_]+)": ', re.MULTILINE)  # entries of a process's environment
STARTS_PROCESSES = ("server/engine_child.py", "adapters_store/worker.py", "adapters_store/sources/fetcher.py")


def test_exit_statuses() -> None:
    told = re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)
    assert {EXIT_CONFIG, EXIT_FAILED, EXIT_STOPPED_EARLY, EXIT_REFUSED, 0, 2} == set(map(int, told))


def test_environment_variables() -> None:
    folders = ("server", "adapters_store", "kernels", "benchmarks", "demo")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")] + [ROOT / "tests" / "conftest.py"]
    found = {name for file in files for match in READ.findall(file.read_text()) for name in match if name}
    for file in STARTS_PROCESSES:
        found |= set(HANDED_ON.findall((ROOT / file).read_text()))
    assert {"HF_HUB_OFFLINE", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "CI", "PYTHONPATH"} <= found  # the search finds
    told = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", PAGE))
    assert found <= told


@pytest.mark.parametrize("file", ["deploy/heddle.service", "Dockerfile", "Makefile"])
def test_what_the_deployment_files_set(file: str) -> None:
    text = (ROOT / file).read_text()
    names = set(re.findall(r"^(?:Environment=|ENV |export )([A-Z][A-Z0-9_]+)", text, re.MULTILINE))
    assert names and all(f"`{name}`" in PAGE for name in names)


def test_the_unit_restarts_as_the_table_says() -> None:
    unit = (ROOT / "deploy" / "heddle.service").read_text()
    assert "\nRestart=on-failure\n" in unit
    assert f"\nRestartPreventExitStatus=2 {EXIT_CONFIG}\n" in unit
    assert f"\nSuccessExitStatus={EXIT_STOPPED_EARLY}\n" in unit
