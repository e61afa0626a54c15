"""A real server on a free port, for benchmarks."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from benchmarks.workload import Job

NEW_TOKENS = 64
ROOT = Path(__file__).resolve().parent.parent


class Speed(NamedTuple):
    """Output tokens a second of time, and of CPU time of both processes, user and system.

    Where other work takes the cores away, the second changes less.
    """

    tokens_per_s: float
    tokens_per_cpu_s: float


class Heddle:
    """The server of the checkout at `root`, over the base and the adapters in `directory`, with more `options`."""

    def __init__(self, directory: Path, root: Path = ROOT, options: Sequence[str] = ()) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "server", "serve", str(directory / "base"), "--adapters",
                   str(directory / "adapters"), "--model-name", "bench-base", "--port", str(self.port),
                   *options]  # fmt: skip
        # in its own root, and first on the path: the environment may hold another checkout of the same packages
        environment = {**os.environ, "PYTHONPATH": str(root), "XDG_DATA_HOME": str(directory / f"data-{self.port}")}
        self._process = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{self.port}"
        deadline = time.monotonic() + 300
        while True:
            try:
                httpx.get(f"{self.url}/health").raise_for_status()
                return
            except httpx.HTTPError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server of {root} did not start") from None
                time.sleep(0.2)

    @property
    def front(self) -> psutil.Process:
        """The process that speaks HTTP; the engine is a child of it."""
        return psutil.Process(self._process.pid)

    def measure(self, jobs: list[Job]) -> Speed:
        """All jobs at once, from the first request's start to the last one's end."""
        before, start = self._cpu_seconds(), time.perf_counter()
        tokens = asyncio.run(self._run(jobs))
        return Speed(tokens / (time.perf_counter() - start), tokens / (self._cpu_seconds() - before))

    def run(self, jobs: list[Job]) -> float:
        """Output tokens a second."""
        return self.measure(jobs).tokens_per_s

    def cpu_seconds_per_token(self, jobs: list[Job]) -> float:
        return 1 / self.measure(jobs).tokens_per_cpu_s

    async def _run(self, jobs: list[Job]) -> int:
        limits = httpx.Limits(max_connections=len(jobs))
        async with httpx.AsyncClient(base_url=self.url, timeout=600, limits=limits) as client:

            async def complete(job: Job) -> int:
                body = {"model": job.adapter or "bench-base", "prompt": job.prompt, "max_tokens": NEW_TOKENS,
                        "temperature": 0}  # fmt: skip
                response = await client.post("/v1/completions", json=body)
                response.raise_for_status()
                return int(response.json()["usage"]["completion_tokens"])

            return sum(await asyncio.gather(*(complete(job) for job in jobs)))

    def _cpu_seconds(self) -> float:
        front = self.front
        return sum(sum(it.cpu_times()[:2]) for it in (front, *front.children(recursive=True)))

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(30)


class OtherWork:
    """What else the machine did meanwhile: `share` of its CPU time went to processes that this one did not start."""

    share = 0.0

    def __enter__(self) -> "OtherWork":
        self._start, self._before = time.monotonic(), self._busy_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = (time.monotonic() - self._start) * (psutil.cpu_count() or 1)
        self.share = max(0.0, self._busy_seconds() - self._before) / seconds

    @staticmethod
    def _busy_seconds() -> float:
        """Of others since boot."""
        machine, this = psutil.cpu_times(), psutil.Process()
        ours = sum(sum(it.cpu_times()[:2]) for it in (this, *this.children(recursive=True)))
        return sum(machine) - machine.idle - getattr(machine, "iowait", 0.0) - getattr(machine, "guest", 0.0) - ours


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
