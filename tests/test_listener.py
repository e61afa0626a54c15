"""Where the server listens, and how many connections it dares to hold."""

import logging
import resource
import socket
from contextlib import closing

import pytest

from server import listener
from server.errors import ConfigError, StartupError

INFINITE = resource.RLIM_INFINITY


class Limit:
    """The limit of open files, in the place of this process's."""

    def __init__(self, soft: int, hard: int) -> None:
        self.now = (soft, hard)

    def getrlimit(self, kind: int) -> tuple[int, int]:
        assert kind == resource.RLIMIT_NOFILE
        return self.now

    def setrlimit(self, kind: int, limits: tuple[int, int]) -> None:
        assert kind == resource.RLIMIT_NOFILE
        self.now = limits


@pytest.mark.parametrize(
    ("soft", "hard", "raised", "room"),
    [
        (1024, 1 << 20, 65_536, 2048),
        (1024, INFINITE, 65_536, 2048),
        (1024, 4096, 4096, 2048),
        (1024, 1024, 1024, 1024 - 128),
        (1 << 20, 1 << 20, 1 << 20, 2048),
        (INFINITE, INFINITE, INFINITE, 2048),
        (129, 129, 129, 1),
        (2048 + 128, 2048 + 128, 2048 + 128, 2048),
    ],
)
def test_the_limit_is_raised_and_what_fits_below_it_is_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, soft: int, hard: int, raised: int, room: int
) -> None:
    limit = Limit(soft, hard)
    monkeypatch.setattr(resource, "getrlimit", limit.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", limit.setrlimit)
    with caplog.at_level(logging.WARNING, "heddle"):
        assert listener.room_for_connections(2048) == room
    assert limit.now == (raised, hard)
    assert (f"{room} connections at once instead of 2048" in caplog.text) == (room < 2048)


def test_a_process_that_may_open_hardly_a_file_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (128, 128))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: None)
    with pytest.raises(ConfigError, match=r"may open 128 files; Heddle needs more than 128 \(ulimit -n\)"):
        listener.room_for_connections(2048)


def test_a_bound_socket_accepts_nothing_yet_and_sends_at_once() -> None:
    with closing(listener.bind("127.0.0.1", 0)) as door:
        with pytest.raises(ConnectionRefusedError), socket.create_connection(door.getsockname(), timeout=5):
            pass
        assert door.proto == socket.IPPROTO_TCP  # by which asyncio knows that it may turn Nagle's algorithm off
        assert listener.url(door) == f"http://127.0.0.1:{door.getsockname()[1]}/v1"


def test_the_url_of_an_ipv6_address_has_brackets() -> None:
    try:
        door = listener.bind("::1", 0)
    except StartupError:
        pytest.skip("no IPv6 here")
    with closing(door):
        assert listener.url(door) == f"http://[::1]:{door.getsockname()[1]}/v1"


def test_what_is_no_address_and_what_is_taken_are_told_apart() -> None:
    """Starting again helps against the second only."""
    with pytest.raises(ConfigError, match="'999.0.0.1' is no address to listen on"):
        listener.bind("999.0.0.1", 0)
    with closing(listener.bind("127.0.0.1", 0)) as door:
        door.listen()
        port = door.getsockname()[1]
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}"):
            listener.bind("127.0.0.1", port)
