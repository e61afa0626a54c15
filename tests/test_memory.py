"""How much memory there is to take: the machine's, and no more than the container's limit leaves."""

from pathlib import Path

import pytest

from server import memory


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process's control group; a limit is two files in it."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def limit(group: Path, most: str, used: str) -> None:
    (group / "memory.max").write_text(f"{most}\n")
    (group / "memory.current").write_text(f"{used}\n")


def test_without_a_limit_it_is_what_the_machine_has(group: Path) -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert 0 < memory.available_bytes() <= int(total.split()[1]) * 1024
    limit(group, "max", "5000")
    assert memory.available_bytes() > 5000


def test_a_limit_leaves_what_is_not_used_of_it(group: Path) -> None:
    limit(group, "9000", "5000")
    assert memory.available_bytes() == 4000


def test_a_group_above_its_limit_leaves_nothing(group: Path) -> None:
    limit(group, "5000", "9000")
    assert memory.available_bytes() == 0


def test_a_limit_above_what_the_machine_has_is_none(group: Path) -> None:
    limit(group, str(1 << 60), "0")
    assert memory.available_bytes() < 1 << 60


def test_a_limit_without_a_count_is_none(group: Path) -> None:
    (group / "memory.max").write_text("5000\n")
    assert memory.available_bytes() > 5000
