"""Where each client is installed: a virtual environment or a node_modules of its own, as its program's header asks.

A program in Python says what it needs as scripts do (PEP 723), one in JavaScript with the same line in a comment:

    # dependencies = ["openai"]

The first is the client itself, in the newest version that the registry has when it is installed.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 1800  # for one installation
_HEADER = re.compile(r"^(?:#|//) dependencies = (\[.*\])$", re.MULTILINE)
_NAME = re.compile(r"[\w.-]+")


class NotInstalled(Exception):
    """With the reason, for people."""


@dataclass(frozen=True)
class Program:
    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def is_node(self) -> bool:
        return self.path.suffix == ".mjs"

    @property
    def needs(self) -> list[str]:
        """Requirements. Raises ValueError where the header is missing."""
        found = _HEADER.search(self.path.read_text(encoding="utf-8"))
        if found is None:
            raise ValueError(f"{self.path} does not say what it needs")
        needs = json.loads(found[1])
        if not needs:
            raise ValueError(f"{self.path} needs no client")
        return [str(it) for it in needs]

    @property
    def package(self) -> str:
        """The client's name in its registry."""
        found = _NAME.match(self.needs[0])
        if found is None:
            raise ValueError(f"{self.path} needs {self.needs[0]!r}, which names no package")
        return found[0]

    @property
    def client(self) -> str:
        return f"{self.package} (Node)" if self.is_node else self.package


def programs_in(folder: Path) -> list[Program]:
    return [Program(path) for path in sorted(folder.iterdir()) if path.suffix in (".py", ".mjs")]


def install(program: Program, room: Path, fresh: bool) -> list[str]:
    """Returns the command that runs programs there. What is there already is used, unless `fresh`."""
    installed, needs = room / ".installed", json.dumps(program.needs)
    if fresh or not installed.exists() or installed.read_text(encoding="utf-8") != needs:
        shutil.rmtree(room, ignore_errors=True)
        room.mkdir(parents=True)
        if program.is_node:
            if shutil.which("npm") is None:
                raise NotInstalled("npm is missing")
            (room / "package.json").write_text('{"private": true}', encoding="utf-8")
            _run(["npm", "install", "--no-audit", "--no-fund", *program.needs], room)
        else:
            _run([sys.executable, "-m", "venv", "."], room)
            _run(["bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *program.needs], room)
        installed.write_text(needs, encoding="utf-8")
    return ["node"] if program.is_node else [str(room / "bin" / "python"), "-P"]


def _run(command: Sequence[str], directory: Path) -> None:
    try:
        done = subprocess.run(command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=SECONDS)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(str(error)) from error
    if done.returncode:
        raise NotInstalled(f"{command[0]} ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
