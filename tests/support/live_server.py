"""A real server in processes of its own, on a free port, ended by its own pid."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_tokenizer(directory: Path) -> None:
    """One token a byte, one more than a model of 256 knows, and a chat template that refuses system messages."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|beyond|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LiveServer:
    def __init__(self, *arguments: str, log: Path, open_files: int | None = None) -> None:
        """`open_files`: the limit that the server finds when it begins to listen."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        # a place of its own for the store that it has unless it is told of one
        self.data = log.with_name(f"{log.name}-data")
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server", "serve", *arguments, "--port", str(self.port), "--threads", "1"],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env={**os.environ, "XDG_DATA_HOME": str(self.data)},
            )  # fmt: skip
        if open_files is not None:
            resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (open_files, open_files))

    def wait_ready(self, timeout_s: float = 90) -> "LiveServer":
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended: {self.output()}")
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx.HTTPError:
                time.sleep(0.05)
        self.kill()
        raise AssertionError(f"the server was not ready: {self.output()}")

    @property
    def engine(self) -> psutil.Process:
        return next(
            child for child in psutil.Process(self.process.pid).children() if "server.engine_process" in child.cmdline()
        )

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 30) -> int:
        """Signal it and wait; returns its exit status."""
        if self.process.poll() is None:
            os.kill(self.process.pid, number)
        try:
            return self.process.wait(timeout_s)
        finally:
            self.kill()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def output(self) -> str:
        return self._log.read_text()

    def stats(self) -> dict[str, float]:
        """Unlabelled metrics by name."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        pairs = [line.split() for line in lines if line and not line.startswith("#") and "{" not in line]
        return {name: float(value) for name, value in pairs}
