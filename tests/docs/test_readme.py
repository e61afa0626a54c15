"""README's commands do what README says: they are taken out of it and run, against real servers."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.live_server import ROOT, LiveServer
from tests.support.waiting import eventually

README = (ROOT / "README.md").read_text()
SHOWN_URL = "http://127.0.0.1:8000"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.slow
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def blocks(heading: str) -> list[tuple[str, str]]:
    """(language, text) of each block below this heading."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = BLOCK.findall(section)
    assert found, heading
    return found


def block(heading: str, language: str) -> str:
    (text,) = (text for name, text in blocks(heading) if name == language)
    return text


def run(command: list[str], text: str, server: LiveServer | None, cwd: Path) -> str:
    """What `text` prints, given to `command` as its input, at this server instead of the shown one."""
    if server is not None:
        assert SHOWN_URL in text
        text = text.replace(SHOWN_URL, server.url)
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, input=text, cwd=cwd, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout


def curl(text: str, server: LiveServer, cwd: Path) -> None:
    """Run each command of the block; the comment below it is what comes back, shortened at each `…`."""
    pairs = re.findall(r"((?:^[^#\n].*\n)+)^# (.*)$", text, re.MULTILINE)
    assert 0 < len(pairs) == len(re.findall(r"^curl ", text, re.MULTILINE))
    for commands, shown in pairs:
        answer = run(["sh", "-e"], commands.replace("curl ", "curl -sS "), server, cwd)
        pattern = ".*".join(map(re.escape, shown.split("…")))
        assert re.match(pattern, answer), answer


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    server = LiveServer(log=tmp_path_factory.mktemp("readme") / "log").wait_ready()
    eventually(lambda: '"max_tokens"' in server.output())  # it listens before it says so
    yield server
    assert server.stop() == 0, server.output()


def test_the_start_looks_as_shown(demo: LiveServer) -> None:
    shown = next(text for _, text in blocks("Start") if text.startswith("$ make serve"))
    table, rest = shown.partition("model   ")[2].split("\n\n", 1)
    printed = [" ".join(line.split()) for line in demo.output().splitlines()]
    for line in ("model " + table).splitlines():
        assert " ".join(line.split()) in printed
    announced, command = rest.replace(SHOWN_URL, demo.url).strip().split("\n\n")
    assert " ".join(announced.split()) in printed
    before, after = command.split("…")
    assert any(line.startswith(before) and line.endswith("}'") for line in printed) and after == "}'"


def test_the_example_of_the_openai_client(demo: LiveServer, tmp_path: Path) -> None:
    text = block("Start", "python")
    answers = run([sys.executable, "-"], text, demo, tmp_path).splitlines()
    shown = re.findall(r"^    \"[^#]*?,  # (.*)$", text, re.MULTILINE)
    assert len(shown) == len(answers) == 5
    for expected, answer in zip(shown, answers, strict=True):
        assert re.fullmatch(".*".join(map(re.escape, expected.split("…"))).replace(r"\ .*", ".*"), answer), answer


def test_the_example_of_schemas_and_tools(demo: LiveServer, tmp_path: Path) -> None:
    text = block("Schemas and tools", "python")
    answers = run([sys.executable, "-"], text, demo, tmp_path).splitlines()
    shown = re.findall(r"^print\(.*\)  # (.*)$", text, re.MULTILINE)
    assert len(shown) == len(answers) == 2
    for expected, answer in zip(shown, answers, strict=True):
        assert re.fullmatch(".*".join(map(re.escape, expected.split("…"))), answer), answer


@needs_curl
def test_adapters_are_added_and_deleted_as_shown(demo: LiveServer, tmp_path: Path) -> None:
    curl(block("Add, replace and delete adapters", "sh"), demo, tmp_path)


@needs_curl
def test_what_peft_trains_is_served(tmp_path: Path) -> None:
    heading = "Train with PEFT, serve with Heddle"
    text = block(heading, "python")
    assert len([line for line in text.splitlines() if line]) <= 15
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    run([sys.executable, "-"], text, None, tmp_path)
    start = next(text for _, text in blocks(heading) if text.startswith("make serve"))
    (arguments,) = re.findall(r'^make serve ARGS="(.*)"$', start, re.MULTILINE)
    options = [str(tmp_path / it) if (tmp_path / it).exists() else it for it in shlex.split(arguments)]
    server = LiveServer(*options, log=tmp_path / "log").wait_ready()
    try:
        curl(block(heading, "sh"), server, tmp_path)
        assert "warning" not in server.output().lower()
    finally:
        server.stop()
