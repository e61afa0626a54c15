"""How much memory there is to take."""

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """What the kernel could hand out without swapping, and no more than the container's limit leaves.

    Not the free pages: loading a model fills memory with file pages that are given up on demand.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return available if limit is None or used is None else max(0, min(available, limit - used))


def _cgroup(name: str) -> int | None:
    """A number of this process's control group (version 2); None where there is none, or no limit."""
    file = _CGROUP / name
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdecimal() else None
