"""Clocks, ceilings and the report."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import transformers
import triton


@dataclass(frozen=True)
class Scale:
    """Real sizes on a GPU; toy sizes in the interpreter, which only show that the script runs."""

    device: torch.device
    is_toy: bool

    def size(self, real: int, toy: int) -> int:
        return toy if self.is_toy else real


class Clock:
    """Seconds of one call, as a median: of replayed graphs on a GPU, where launches cost what they cost in serving."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"

    def seconds(self, calls: Sequence[Callable[[], object]], repeats: int = 7) -> float:
        """Of one of `calls`, which do the same on different memory, so that caches do not help more than in a model."""
        if not self._is_cuda:
            return self._wall(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(side)
        rounds = max(1, 16 // len(calls))
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                for _ in range(rounds):
                    for call in calls:
                        call()
        finally:
            torch.cuda.set_stream(before)  # a capture that fails may leave its own stream behind
        graph.replay()
        return statistics.median(self.events(graph.replay) for _ in range(repeats)) / (rounds * len(calls))

    def events(self, call: Callable[[], object]) -> float:
        """Seconds on the device between the call's first work and its last."""
        if not self._is_cuda:
            return self._wall([call])
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _wall(self, calls: Sequence[Callable[[], object]]) -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)


def copy_bandwidth(scale: Scale, clock: Clock) -> float:
    """Bytes a second that a device-to-device copy reads and writes."""
    source = torch.empty(scale.size(2 << 30, 1 << 16), dtype=torch.uint8, device=scale.device)
    target = torch.empty_like(source)
    return 2 * len(source) / clock.seconds([lambda: target.copy_(source)])


def matrix_rate(scale: Scale, clock: Clock) -> float:
    """Operations a second of a large bfloat16 product on random data."""
    size = scale.size(8192, 64)
    a, b = (torch.randn(size, size, device=scale.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / clock.seconds([lambda: a @ b])


@dataclass
class Report:
    """JSON and a page of tables, written anew after every section, so that a run that is cut still says something."""

    directory: Path
    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, Any] = field(default_factory=dict)

    def add(self, title: str, rows: list[dict[str, Any]], seconds: float) -> None:
        self.sections[title] = {"seconds": round(seconds, 1), "rows": rows}
        self.write()

    def write(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {"facts": self.facts, "sections": self.sections}
        (self.directory / f"{self.name}.json").write_text(json.dumps(content, indent=1) + "\n")
        (self.directory / f"{self.name}.md").write_text(self.as_text())

    def as_text(self) -> str:
        lines = [f"# {self.facts.get('device', '')}, {self.facts.get('date', '')}", ""]
        lines += [f"- {key}: {value}" for key, value in self.facts.items()]
        for title, section in self.sections.items():
            lines += ["", f"## {title} ({section['seconds']} s)", ""]
            for _, rows in groupby(section["rows"], key=tuple):  # by what they tell
                lines += [*as_table(list(rows)), ""]
        return "\n".join(lines) + "\n"


def as_table(rows: list[dict[str, Any]]) -> list[str]:
    """Of rows with the same keys."""
    columns = list(rows[0])
    body = [f"| {' | '.join(map(_cell, row.values()))} |" for row in rows]
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *body]


def _cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def facts(scale: Scale) -> dict[str, Any]:
    """What ran where, and when."""
    is_cuda = scale.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(scale.device) if is_cuda else "interpreter",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "driver": _driver() if is_cuda else "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "memory_bytes": torch.cuda.get_device_properties(scale.device).total_memory if is_cuda else 0,
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
