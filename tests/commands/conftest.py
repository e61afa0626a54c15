"""A store that a server has used, without the server, and the command line in this process."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from adapters_store.room import Room
from adapters_store.store.store import open_store
from server import cli, storage
from server.lifecycle.terms import Terms
from tests.support.adapter_files import BASE, lora

TERMS = Terms(("tiny",), False, 1e-3, 1 << 20, 2, None)
Heddle = Callable[..., "Done"]


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def heddle(capsys: pytest.CaptureFixture[str]) -> Heddle:
    def run(*arguments: object) -> Done:
        status = cli.main([str(it) for it in arguments])
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture
def store(tmp_path: Path) -> Path:
    directory = tmp_path / "store"
    with closing(open_store(directory)) as store:
        storage.remember(store, storage.Identity("tiny", BASE, Room(1 << 20, 4, 4), TERMS))
    return directory


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return lora(tmp_path / "one")
