"""What every system can be asked, and two ways to be one: a server over HTTP, a program with lines of JSON."""

import abc
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil

from benchmarks.peers import openai_stream
from benchmarks.peers.load import Answer, Load
from benchmarks.served import free_port
from benchmarks.workload import Job

BASE_NAME = "bench-base"
START_S = 420.0


class DidNotStart(Exception):
    """With the reason, for people."""


@dataclass(frozen=True)
class Served:
    """What a system is to serve. `adapters`: names of folders in directory/adapters; PEFT's LoRA unless `esft`."""

    directory: Path
    adapters: Sequence[str] = ()
    esft: bool = False
    context: int = 1024  # longest sequence, tokens
    threads: int = 2
    max_running: int = 64
    prefix_cache: bool = False
    max_rank: int = 16
    options: Sequence[str] = ()  # Heddle's alone


class System(abc.ABC):
    """Starts once for a suite. `can`: the words base, one, mixed, grouped, esft, online, http, many, moe."""

    name: ClassVar[str]
    can: ClassVar[frozenset[str]]
    settings: ClassVar[str]  # for people

    def __init__(self, rooms: Path) -> None:
        self.rooms = rooms
        self.versions: dict[str, str] = {}
        self.start_s = 0.0
        self.served: Served | None = None
        self._process: subprocess.Popen[Any] | None = None

    @abc.abstractmethod
    def prepare(self, served: Served) -> None:
        """Install and convert what is missing. Raises NotInstalled, DidNotStart."""

    @abc.abstractmethod
    def _start(self, served: Served) -> None: ...

    @abc.abstractmethod
    def run(self, load: Load) -> list[Answer]: ...

    def start(self, served: Served) -> None:
        """Returns when it can be asked; `start_s` is how long that took. Raises DidNotStart, NotInstalled."""
        self.prepare(served)
        self.served, begun = served, time.perf_counter()
        self._start(served)
        self.start_s = time.perf_counter() - begun

    def stop(self) -> None:
        """Its whole process group: engines are children."""
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not taken by a process that has ended
                    pipe.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
                if number == signal.SIGKILL:
                    return

    def processes(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self._process.pid)
            return [first, *first.children(recursive=True)]
        return []

    def cpu_seconds(self) -> float:
        return sum(sum(it.cpu_times()[:2]) for it in self.processes())

    def rss_mib(self) -> float:
        return sum(it.memory_info().rss for it in self.processes()) / 2**20

    def _spawn(self, command: Sequence[str], served: Served, more: Mapping[str, str] = {}, **pipes: Any) -> None:
        log = (served.directory / f"{self.name}.log").open("ab")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1",
                       "OMP_NUM_THREADS": str(served.threads), **more}  # fmt: skip
        if "PYTHONPATH" not in more:
            environment.pop("PYTHONPATH", None)  # this checkout's packages are not the peers'
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, **pipes}
        self._process = subprocess.Popen(
            command, env=environment, cwd=served.directory, start_new_session=True, **streams
        )
        log.close()

    def log_tail(self, served: Served) -> str:
        log = served.directory / f"{self.name}.log"
        lines = [it for it in log.read_text(errors="replace").splitlines() if it.strip()] if log.exists() else []
        telling = [it for it in lines if "Error" in it or "error" in it]
        return " | ".join((telling or lines)[-2:])[-400:]


class HttpSystem(System):
    """A server of its own process with OpenAI's completions."""

    health = "/health"
    port: int

    def body(self, job: Job, new_tokens: int) -> dict[str, Any]:
        return {"model": job.adapter or BASE_NAME, "prompt": job.prompt, "max_tokens": new_tokens, "temperature": 0,
                "stream": True}  # fmt: skip

    def forget(self) -> None:
        """What prompts have left in its prefix cache is not found by those asked from now on."""

    def run(self, load: Load) -> list[Answer]:
        self.forget()
        return openai_stream.run(self.port, load, self.body)

    def _serve(self, command: Sequence[str], served: Served, more: Mapping[str, str] = {}) -> None:
        """Returns when it is healthy. `{port}` in the command is the one it gets."""
        self.port = free_port()
        self._spawn([it.replace("{port}", str(self.port)) for it in command], served, more)
        assert self._process is not None
        deadline = time.monotonic() + START_S
        while not self._is_healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise DidNotStart(f"{self.name}: {self.log_tail(served)}")
            time.sleep(0.1)

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.health}", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


class ProgramSystem(System):
    """A program in the peer's own environment: one line of JSON in, one out."""

    def _serve_program(self, python: Path, program: Path, served: Served, **told: Any) -> None:
        self._spawn([str(python), "-P", str(program)], served, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        answer = self._ask(base=str(served.directory / "base"), threads=served.threads, **told)
        self.versions = dict(answer["versions"])

    def _ask(self, **line: Any) -> dict[str, Any]:
        assert self._process is not None and self.served is not None
        try:
            self._process.stdin.write(json.dumps(line) + "\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
            told = self._process.stdout.readline()  # type: ignore[union-attr]
        except OSError:
            told = ""
        if not told:
            self.stop()
            raise DidNotStart(f"{self.name}: {self.log_tail(self.served)}")
        return dict(json.loads(told))

    def run(self, load: Load) -> list[Answer]:
        asked = [{"prompt": job.prompt, "adapter": job.adapter} for job in load.jobs]
        told = self._ask(jobs=asked, new_tokens=load.new_tokens)
        return [Answer(it["tokens"], it["sent"], it["end"], it["times"]) for it in told["answers"]]
