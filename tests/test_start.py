"""Starts that fail, and the commands' help: what is said, and with which status."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.exits import EXIT_CONFIG, EXIT_FAILED
from tests.support.breadth import always
from tests.support.live_server import ROOT, LiveServer, write_tokenizer
from tests.support.tiny_models import save_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("start") / "tiny"
    write_tokenizer(save_model(directory, "llama", vocab_size=256, max_position_embeddings=1024))
    return directory


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[LiveServer]:
    server = LiveServer(str(model), log=tmp_path / "log").wait_ready()
    yield server
    server.kill()


FIRST = [
    (["/nowhere"], "does not exist"),
    (["MODEL", "--max-model-len", "5000"], "5000 exceeds what the model was made for, 1024"),
    (["MODEL", "--kv-cache-bytes", "10"], "less than one block"),
    (["MODEL", "--adapters", "/nowhere"], "'/nowhere' does not exist"),
    (["MODEL", "--port", "99999"], "99999"),
]
MORE = [
    ([str(ROOT / "docs")], "tokenizer.json"),
    (["MODEL", "--device", "cuda"], "cuda"),
    (["MODEL", "--tokens-per-step", "4"], "tokens_per_step (4) must be at least max_running (128)"),
    (["MODEL", "--host", "no.such.host.invalid"], "'no.such.host.invalid' is no address to listen on"),
]


@pytest.mark.parametrize(("arguments", "says"), always([*FIRST, *MORE], *FIRST))
def test_a_start_that_fails_says_why_in_one_line(model: Path, arguments: list[str], says: str) -> None:
    command = [str(model) if it == "MODEL" else it for it in arguments]
    port = ["--port", "0"] if "--port" not in arguments else []
    done = subprocess.run(
        [sys.executable, "-m", "server", "serve", *command, *port],
        cwd=ROOT, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == EXIT_CONFIG, done.stderr
    assert says in done.stderr and "heddle:" in done.stderr


def test_a_port_that_is_taken_is_a_clear_error(server: LiveServer, model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "serve", str(model), "--port", str(server.port)],
        cwd=ROOT, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == EXIT_FAILED and f"cannot listen on 127.0.0.1:{server.port}" in done.stderr


@pytest.mark.parametrize("command", [[], ["serve"]])
def test_help_is_complete(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", *command, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "usage: heddle" in done.stdout
    if command:
        for option in ("--adapters", "--host", "--port", "--device", "--dtype", "--adapter-root", "--kv-cache-bytes"):
            assert option in done.stdout
