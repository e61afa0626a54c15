"""Rows as they come, a JSON line each, and a page of tables that is written anew after every section."""

import importlib.util
import json
import math
import platform
import runpy
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.gpu import goals
from benchmarks.gpu.sections import SECTIONS

Row = dict[str, Any]
FACTS, ENDED = "facts", "ended"  # what the first and the last line of a section's file have instead of figures


class RowFile:
    """DIR/<section>.jsonl. Several processes may write to it: a row is one write at the end of the file."""

    def __init__(self, directory: Path, section: str) -> None:
        self.path = directory / f"{section}.jsonl"

    def begin(self, facts: Row) -> None:
        """Whatever an earlier run of the section left goes."""
        self.path.write_text("")
        self.append({FACTS: facts})

    def append(self, row: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")

    def read(self) -> list[Row]:
        """A line that a killed process left unfinished is left out."""
        rows = []
        for line in self.path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows


def _plain(value: object) -> object:
    """JSON has no infinity and no NaN."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def failures(rows: list[Row]) -> list[str]:
    """Of a section's file: what went wrong, a line each. A section that measured nothing has failed."""
    found = [_as_line(row) for row in rows if row.get("failed") or row.get("ok") is False]
    ends = [row for row in rows if ENDED in row]
    found += [f"{row[ENDED]} {row.get('parts', '')}".strip() for row in ends if row[ENDED] != "well"]
    if not ends:
        found.append("it has not ended")
    return found or ([] if figures(rows) else ["it gave no rows"])


def figures(rows: list[Row]) -> list[Row]:
    return [row for row in rows if FACTS not in row and ENDED not in row]


def write_summary(directory: Path) -> Path:
    """Of every section that has a file here, whichever command wrote it."""
    files = {section.name: RowFile(directory, section.name) for section in SECTIONS}
    read = {name: file.read() for name, file in files.items() if file.path.is_file()}
    facts = next((row[FACTS] for rows in read.values() for row in rows if FACTS in row), {})
    lines = [f"# {facts.get('device', '')}, {facts.get('date', '')}", ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", "| section | | seconds | rows | skipped |", "|---|---|---:|---:|---:|"]
    for name, rows in read.items():
        seconds = max((row["seconds"] for row in rows if ENDED in row), default=0.0)
        bad, skipped = failures(rows), sum("skipped" in row for row in figures(rows))
        lines.append(
            f"| {name} | {f'FAILED ({len(bad)})' if bad else 'ok'} | {seconds} | {len(figures(rows))} | {skipped} |"
        )
    lines += ["", "## Goals", "", *as_table(goals.table({name: figures(rows) for name, rows in read.items()}))]
    for name, rows in read.items():
        lines += ["", f"## {name}", "", *(f"- FAILED {line}" for line in failures(rows)), ""]
        for _, alike in groupby(figures(rows), key=tuple):  # by what they tell
            lines += [*as_table(list(alike)), ""]
    path = directory / "summary.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def as_table(rows: list[Row]) -> list[str]:
    """Of rows with the same keys."""
    columns = list(rows[0])
    body = [f"| {' | '.join(map(as_cell, row.values()))} |" for row in rows]
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *body]


def as_cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")


def _as_line(row: Row) -> str:
    return ", ".join(f"{key} {as_cell(value)}" for key, value in row.items())


def gather_facts() -> Row:
    """What runs where, and when. Without opening the device."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    name, driver, memory = ([*_output(asked).split(", "), "", "", ""])[:3]
    if not driver and Path("/dev/nvidiactl").exists():
        name, driver = "NVIDIA GPU", "unknown: there is no nvidia-smi"
    return {
        "device": name or "no GPU: the interpreter",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "driver": driver,
        "memory": memory,
        "python": platform.python_version(),
        **_torch_versions(),
        **{package: _version(package) for package in ("triton", "transformers", "msgspec")},
        "commit": _output(["git", "rev-parse", "--short", "HEAD"]),
    }


def _output(command: list[str]) -> str:
    """The first line; nothing where there is no such program or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().partition("\n")[0]


def _torch_versions() -> Row:
    """torch's own, and of the CUDA that it was built for; without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return {"torch": "not installed"}
    said = runpy.run_path(str(Path(found.origin).parent / "version.py"))
    return {"torch": str(said["__version__"]), "CUDA": str(said.get("cuda"))}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
