"""This checkout's server, over HTTP."""

import os
import sys
from importlib.metadata import version
from typing import Any, ClassVar

from benchmarks.peers.systems.system import BASE_NAME, HttpSystem, Served
from benchmarks.served import ROOT
from benchmarks.workload import Job


class HeddleSystem(HttpSystem):
    name = "heddle"
    can: ClassVar = frozenset({"base", "one", "mixed", "esft", "online", "http", "many", "moe", "register"})
    settings = (
        "float32, all defaults but --threads and --max-running; its prefix cache cannot be switched off: each run has "
        "a cache_salt of its own, unless a suite is about prefixes"
    )
    _salts = 0

    def prepare(self, served: Served) -> None:
        names = ("torch", "transformers")
        self.versions = {"heddle": version("heddle-server"), **{it: version(it) for it in names}}

    def _start(self, served: Served) -> None:
        adapters = ["--adapters", str(served.directory / "adapters")] if served.adapters else []
        command = [sys.executable, "-m", "server", "serve", str(served.directory / "base"), *adapters, "--model-name",
                   BASE_NAME, "--port", "{port}", "--threads", str(served.threads), "--max-running",
                   str(served.max_running), *served.options]  # fmt: skip
        self._caches = served.prefix_cache
        data = str(served.directory / f"data-{os.getpid()}-{len(list(served.directory.glob('data-*')))}")
        self._serve(command, served, {"PYTHONPATH": str(ROOT), "XDG_DATA_HOME": data})

    def forget(self) -> None:
        self._salts += not self._caches

    def body(self, job: Job, new_tokens: int) -> dict[str, Any]:
        return super().body(job, new_tokens) | {"cache_salt": f"run {self._salts}"}
