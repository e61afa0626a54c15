"""Connections that stall, hoard or do not speak HTTP: the real protocol on a real socket, before an application of one
route."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from server import listener
from server.api.transport.connection import ConnectionLimits, limited
from server.api.transport.limits import MAX_HEADERS, RequestLimits
from tests.support.waiting import eventually

LIMITS = ConnectionLimits(max_connections=5, header_s=0.5, body_s=0.5, write_s=0.5)
PATIENT = ConnectionLimits(max_connections=5, header_s=30, body_s=30, write_s=30)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


class Application:
    """Answers with the body that it was sent; /slow waits, /endless streams until the client has gone."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self.release = threading.Event()
        self.num_slow = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left.set()
                return
            body += message["body"]
            if not message.get("more_body"):
                break
        self.num_slow += scope["path"] == "/slow"
        while scope["path"] == "/slow" and not self.release.is_set():
            await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/large":
            body = b"x" * 30_000
        while scope["path"] == "/endless" and not self.left.is_set():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
            gone = asyncio.ensure_future(receive())
            await asyncio.wait((gone,), timeout=0.001)
            if gone.done():
                self.left.set()
            gone.cancel()
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def application() -> Application:
    return Application()


@pytest.fixture
def limits() -> ConnectionLimits:
    return LIMITS


@pytest.fixture
def port(application: Application, limits: ConnectionLimits) -> Iterator[int]:
    door = listener.bind("127.0.0.1", 0)
    config = uvicorn.Config(
        RequestLimits(application, 1000), http=limited(limits), log_level="critical", lifespan="off",
        h11_max_incomplete_event_size=8192,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[door])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield door.getsockname()[1]
    application.release.set()
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def connect(port: int, sent: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(sent)
    return connection


def answer(connection: socket.socket) -> tuple[int, str]:
    """Status and body; all that comes until the server closes. (0, "") if nothing does."""
    with closing(connection):
        raw = b""
        while chunk := connection.recv(65536):
            raw += chunk
    head, _, body = raw.partition(b"\r\n\r\n")
    return (int(head.split()[1]), body.decode()) if head else (0, "")


def refusal(connection: socket.socket) -> tuple[int, str]:
    status, body = answer(connection)
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, error["message"]


def test_a_socket_that_says_nothing_is_closed(port: int) -> None:
    start = time.monotonic()
    assert answer(connect(port)) == (0, "")
    assert time.monotonic() - start > 0.4


def test_half_a_head_and_half_a_body_are_told_so(port: int, application: Application) -> None:
    assert refusal(connect(port, GET)) == (408, "the head of the request did not arrive within 0.5 s")
    assert not application.left.is_set()
    assert refusal(connect(port, POST + b"ab")) == (408, "the body of the request did not arrive within 0.5 s")
    assert application.left.wait(60)


def test_a_head_that_trickles_in_has_no_longer(port: int) -> None:
    start = time.monotonic()
    with closing(connect(port, b"G")) as connection, contextlib.suppress(OSError):
        while time.monotonic() - start < 30:
            connection.sendall(b"x")
            time.sleep(0.05)
    assert time.monotonic() - start < 20


def test_an_answer_that_nobody_reads_ends(port: int, application: Application) -> None:
    with closing(connect(port, b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")):
        assert application.left.wait(60)


def test_a_place_is_given_back_though_the_end_of_an_answer_stays_unread(port: int) -> None:
    """Less than what asyncio itself takes for too much: the connection closes, and waits for its reader."""
    readers = []
    for _ in range(LIMITS.max_connections):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", port))
        reader.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n" * 99)
        reader.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        readers.append(reader)
    time.sleep(2)
    eventually(lambda: answer(connect(port, GET + b"Connection: close\r\n\r\n"))[0] == 200)
    for reader in readers:
        reader.close()


@pytest.mark.parametrize("limits", [PATIENT])
def test_when_all_places_are_taken_the_one_silent_longest_gives_way(port: int) -> None:
    silent = []
    for _ in range(5):
        silent.append(connect(port))
        time.sleep(0.02)
    start = time.monotonic()
    assert answer(connect(port, GET + b"Connection: close\r\n\r\n"))[0] == 200
    assert time.monotonic() - start < 20  # nobody has become silent for too long
    assert silent[0].recv(1) == b""
    silent[1].sendall(GET + b"Connection: close\r\n\r\n")
    assert answer(silent[1])[0] == 200
    for connection in silent:
        connection.close()


@pytest.mark.parametrize("limits", [PATIENT])
def test_when_all_places_are_at_work_a_new_one_is_told_so(port: int, application: Application) -> None:
    busy = [connect(port, b"GET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") for _ in range(5)]
    eventually(lambda: application.num_slow == 5)
    assert refusal(connect(port)) == (503, "all 5 connections are in use")
    application.release.set()
    assert [answer(connection)[0] for connection in busy] == [200] * 5


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10 + b"\r\n\r\n", 400, "not a sound HTTP request"),
        (GET + b"A: " + b"x" * 40_000, 431, "head of the request is too large"),
        (GET + b"".join(b"A%d: x\r\n" % i for i in range(MAX_HEADERS)) + b"\r\n", 431, "101 headers; at most 100"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled "
         b"HTTP/1.1\r\nHost: x\r\n\r\n", 400, "Content-Length beside Transfer-Encoding"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\nExpect: 100-continue\r\n\r\n", 413, "1,000 bytes"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx", 415, "compressed"),
    ],
    ids=["TLS", "long head", "many headers", "two lengths", "long body", "gzip"],
)  # fmt: skip
def test_refusals_have_the_shape_of_every_error_and_are_the_last_answer(
    port: int, sent: bytes, status: int, says: str
) -> None:
    got, message = refusal(connect(port, sent))
    assert got == status and says in message


@pytest.mark.parametrize("limits", [ConnectionLimits(max_connections=5, header_s=1.5, body_s=1.5, write_s=1.5)])
def test_requests_in_a_row_and_ahead_of_their_answers_are_served(port: int) -> None:
    with closing(connect(port)) as connection:
        for _ in range(3):
            connection.sendall(GET + b"\r\n")
            got = b""
            while not got.endswith(b"0\r\n\r\n"):  # the last chunk
                got += connection.recv(65536)
            assert got.startswith(b"HTTP/1.1 200")
            time.sleep(0.6)  # less than a limit each, more than one together
    status, body = answer(connect(port, POST + b"abcd" + POST[:-2] + b"Connection: close\r\n\r\nefgh"))
    assert status == 200 and "efgh" in body


def test_nagle_is_off_on_accepted_connections() -> None:
    """asyncio looks at the protocol of the listening socket, not at its kind."""
    seen: list[int] = []

    class Look(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted = transport.get_extra_info("socket")
            seen.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.close()

    async def run() -> None:
        with listener.bind("127.0.0.1", 0) as door:
            server = await asyncio.get_running_loop().create_server(Look, sock=door)
            with closing(await asyncio.to_thread(connect, door.getsockname()[1])) as connection:
                await asyncio.to_thread(connection.recv, 1)
            server.close()

    asyncio.run(run())
    assert seen == [1]
