"""Uploads over HTTP, with real clients on a real socket: whole files, pieces, forms, and senders that stall."""

import asyncio
import errno
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response

from adapters_store.upload_files import UploadFile, UploadLimits
from adapters_store.uploads import Uploads
from server import listener
from server.api.catalogue import uploads as routes
from server.api.catalogue.forms import receive_multipart
from server.api.transport import errors
from server.api.transport.connection import MIN_FILE_BYTES_PER_S, ConnectionLimits, limited
from server.api.transport.errors import respond
from server.api.transport.limits import RequestLimits
from tests.support.waiting import eventually

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BODY_S = 0.5
LIMITS = UploadLimits(max_upload_bytes=8_000_000, max_uploads=4, max_writers=4)


def application(uploads: Uploads) -> FastAPI:
    app = FastAPI(openapi_url=None)  # all routes are ours
    app.state.service = SimpleNamespace(uploads=uploads, config=SimpleNamespace(cors_origins=()))
    app.include_router(routes.router)

    @app.post("/v1/adapters")
    async def add(request: Request) -> Response:
        form = await receive_multipart(request, uploads)
        files = (await uploads.get(form.upload_id)).files
        await uploads.delete(form.upload_id)
        return respond(201, {"fields": form.fields, "files": files})

    @app.put("/other")
    async def other(request: Request) -> Response:
        return respond(200, {"bytes": len(await request.body())})

    errors.install(app)
    app.add_middleware(RequestLimits, max_bytes=1000, max_file_bytes=uploads.limits.max_upload_bytes)
    return app


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    uploads, door = Uploads(tmp_path / "uploads", LIMITS), listener.bind("127.0.0.1", 0)
    limits = ConnectionLimits(max_connections=20, header_s=2, body_s=BODY_S, write_s=2)
    config = uvicorn.Config(application(uploads), http=limited(limits), log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[door])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{door.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    uploads.close()
    assert not thread.is_alive()


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=20) as client:
        yield client


@pytest.fixture
def upload(http: httpx.Client) -> str:
    return str(http.post("/v1/uploads").json()["id"])


def file_url(upload: str, name: str = WEIGHTS) -> str:
    return f"/v1/uploads/{upload}/files/{name}"


def error_of(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"]


def begin(url: str, method: str, path: str, length: int, sent: bytes = b"", header: str = "") -> socket.socket:
    """A request whose body is the caller's to send."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = socket.create_connection((host, int(port)), timeout=60)
    connection.sendall(
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n{header}\r\n".encode() + sent
    )
    return connection


def status_of(connection: socket.socket) -> int:
    """Of an answer; 0 if the connection is closed without one."""
    with closing(connection):
        head = connection.recv(65536)
    return int(head.split()[1]) if head else 0


def test_an_upload_from_its_beginning_to_its_end(http: httpx.Client, tmp_path: Path) -> None:
    created = http.post("/v1/uploads")
    assert created.status_code == 201
    told = created.json()
    upload = told.pop("id")
    assert abs(told.pop("expires_at") - time.time() - 24 * 3600) < 60
    assert told == {
        "object": "adapter.upload", "files": {}, "bytes": 0, "max_bytes": 8_000_000, "max_files": 64,
    }  # fmt: skip
    assert http.head(file_url(upload)).headers["Upload-Offset"] == "0"
    put = http.put(file_url(upload, CONFIG), json={"r": 8})
    assert (put.status_code, put.headers["Upload-Offset"], put.content) == (204, "7", b"")
    data = os.urandom(3_000_000)
    for start, end in ((0, 1_000_000), (1_000_000, 3_000_000)):
        patch = http.patch(file_url(upload), content=data[start:end], headers={"Upload-Offset": str(start)})
        assert (patch.status_code, patch.headers["Upload-Offset"]) == (204, str(end))
    assert http.head(file_url(upload)).headers["Upload-Offset"] == "3000000"
    got = http.get(f"/v1/uploads/{upload}").json()
    assert (got["files"], got["bytes"]) == ({CONFIG: 7, WEIGHTS: 3_000_000}, 3_000_007)
    assert (tmp_path / "uploads" / upload / WEIGHTS).read_bytes() == data
    assert http.delete(f"/v1/uploads/{upload}").json() == {"id": upload, "object": "adapter.upload", "deleted": True}
    for answer in (http.get(f"/v1/uploads/{upload}"), http.put(file_url(upload), content=b"x")):
        assert error_of(answer) == (404, "upload_not_found")


def test_what_is_refused(http: httpx.Client, upload: str) -> None:
    http.put(file_url(upload), content=b"12345")
    for headers, status in (({}, 400), ({"Upload-Offset": "-1"}, 400), ({"Upload-Offset": "9" * 19}, 400)):
        assert error_of(http.patch(file_url(upload), content=b"x", headers=headers)) == (status, "invalid_value")
    conflict = http.patch(file_url(upload), content=b"x", headers={"Upload-Offset": "4"})
    assert error_of(conflict) == (409, "upload_conflict") and conflict.headers["Upload-Offset"] == "5"
    assert error_of(http.put(file_url(upload, "a.bin"), content=b"x")) == (422, "unsupported_adapter")
    for name in ("README.md", ".safetensors", "..%5ca.safetensors", "a%00.safetensors"):
        assert error_of(http.put(file_url(upload, name), content=b"x")) == (400, "file_name_refused")
    for name in ("..%2fa.safetensors", "a/b.safetensors", "..", ""):
        assert http.put(file_url(upload, name), content=b"x").status_code in (404, 405)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert error_of(http.put(file_url(upload), content=b"x", headers=form)) == (400, "invalid_body")
    assert error_of(http.post("/v1/uploads", headers={"Sec-Fetch-Site": "cross-site"})) == (400, "cross_site")
    assert http.post("/v1/uploads", content=b"x" * 1001).status_code == 413  # any other body
    assert http.get(f"/v1/uploads/{upload}").json()["files"] == {WEIGHTS: 5}


def test_sizes_are_limited_by_length_and_while_they_are_read(http: httpx.Client, upload: str) -> None:
    assert error_of(http.put(file_url(upload), content=b"x" * 10_100_000)) == (413, None)

    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1_000_000

    try:
        assert error_of(http.put(file_url(upload), content=endless())) == (413, "upload_too_large")
    except httpx.WriteError:
        pass  # it was still sending when the connection was closed
    assert http.get(f"/v1/uploads/{upload}").json()["bytes"] <= 8_000_000
    assert http.put(file_url(upload), content=b"x" * 8_000_000).status_code == 204


def test_no_more_uploads_than_may(http: httpx.Client) -> None:
    for _ in range(4):
        assert http.post("/v1/uploads").status_code == 201
    full = http.post("/v1/uploads")
    assert error_of(full) == (503, "overloaded") and full.headers["Retry-After"] == "1"


def test_a_full_disk_is_507(http: httpx.Client, upload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    answer = http.put(file_url(upload), content=b"x")
    assert error_of(answer) == (507, "store_full") and answer.json()["error"]["type"] == "insufficient_storage"


def test_what_a_client_sent_before_it_left_is_kept(url: str, http: httpx.Client, upload: str) -> None:
    begin(url, "PUT", file_url(upload), 3_000_000, b"x" * 700_001).close()
    eventually(lambda: http.head(file_url(upload)).headers["Upload-Offset"] == "700001")
    rest = http.patch(file_url(upload), content=b"x" * 2_299_999, headers={"Upload-Offset": "700001"})
    assert rest.status_code == 204


def test_a_body_may_take_long_as_long_as_it_moves(url: str, upload: str) -> None:
    piece = b"x" * int(MIN_FILE_BYTES_PER_S * BODY_S / 4)
    connection = begin(url, "PUT", file_url(upload), 30 * len(piece))
    for _ in range(30):  # in three times the time that another body has
        connection.sendall(piece)
        time.sleep(BODY_S / 10)
    assert status_of(connection) == 204


@pytest.mark.parametrize("path", ["files/adapter_model.safetensors", "form"])
def test_a_body_that_stops_or_trickles_is_given_up(url: str, http: httpx.Client, upload: str, path: str) -> None:
    method, target, header = "PUT", f"/v1/uploads/{upload}/{path}", ""
    if path == "form":
        method, target, header = "POST", "/v1/adapters", "Content-Type: multipart/form-data; boundary=b\r\n"
    stopped = begin(url, method, target, 1_000_000, b"--b", header)
    trickles = begin(url, method, target, 1_000_000, b"--b", header)
    trickles.setblocking(False)
    start = time.monotonic()
    head = b""
    while not head and time.monotonic() - start < 30:
        time.sleep(0.02)
        try:
            trickles.send(b"\r")
            head = trickles.recv(1000)
        except BlockingIOError:
            continue
        except ConnectionError:
            break
    assert time.monotonic() - start < 20
    trickles.close()
    assert status_of(stopped) == 408
    assert http.post("/v1/uploads").status_code == 201  # the form's own upload is gone


def test_other_bodies_have_no_longer_than_before(url: str) -> None:
    connection, num_sent = begin(url, "PUT", "/other", 1000), 0
    connection.settimeout(BODY_S / 20)
    head = b""
    while not head and num_sent < 1000:  # which would take a hundred times as long
        num_sent += connection.send(b"x")
        with suppress(TimeoutError):
            head = connection.recv(1000)
    connection.close()
    assert head.startswith(b"HTTP/1.1 408 ")


def test_a_slow_disk_holds_the_sender_back_and_is_not_its_fault(
    url: str, upload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on, write, size = threading.Event(), UploadFile.write, 7_900_000

    def slow(file: UploadFile, data: bytes) -> None:
        may_go_on.wait(60)
        write(file, data)

    monkeypatch.setattr(UploadFile, "write", slow)
    connection = begin(url, "PUT", file_url(upload), size)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    connection.setblocking(False)
    sent, start = 0, time.monotonic()
    while time.monotonic() - start < 3 * BODY_S:
        try:
            sent += connection.send(b"x" * min(65536, size - sent))
        except BlockingIOError:
            time.sleep(0.01)
    assert 0 < sent < 7_500_000  # the kernel's buffers take most of that
    may_go_on.set()
    connection.settimeout(60)
    connection.sendall(b"x" * (size - sent))
    assert status_of(connection) == 204


def form_of(*files: tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [("files", file) for file in files]


def test_a_form_with_files_and_fields(http: httpx.Client, tmp_path: Path) -> None:
    weights = os.urandom(2_000_000) + b"\r\n--" + os.urandom(100)
    answer = http.post("/v1/adapters", data={"name": "late", "manifest": '{"a": "ü"}'},
                       files=form_of((CONFIG, b"{}"), (WEIGHTS, weights)))  # fmt: skip
    assert answer.status_code == 201
    assert answer.json() == {
        "fields": {"name": "late", "manifest": '{"a": "ü"}'},
        "files": {CONFIG: 2, WEIGHTS: len(weights)},
    }
    assert os.listdir(tmp_path / "uploads") == []


def test_forms_as_curl_sends_them(url: str, tmp_path: Path) -> None:
    for name, data in ((CONFIG, b"{}"), (WEIGHTS, b"\r\n" * 5000)):
        (tmp_path / name).write_bytes(data)
    said = subprocess.run(
        ["curl", "-s", f"{url}/v1/adapters", "-F", "name=late", "-F", f"files=@{tmp_path / CONFIG}", "-F",
         f"files=@{tmp_path / WEIGHTS}"], capture_output=True, check=True,
    )  # fmt: skip
    assert json.loads(said.stdout) == {"fields": {"name": "late"}, "files": {CONFIG: 2, WEIGHTS: 10_000}}


PART = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
FILE = PART % (b"files", b'; filename="adapter_config.json"', b"{}")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "ends before its last boundary"),
        (b"junk", "malformed"),
        (FILE, "ends before its last boundary"),
        (FILE[:30], "ends before its last boundary"),
        (b"--b--\r\n", "no part called 'files'"),
        (PART % (b"name", b"", b"x") + b"--b--\r\n", "no part called 'files'"),
        (FILE + FILE + b"--b--\r\n", "two files are called"),
        (PART % (b"colour", b"", b"x") + b"--b--\r\n", "may have the fields name,"),
        (PART % (b"name", b"", b"x") * 2 + b"--b--\r\n", "twice"),
        (PART % (b"name", b'; filename="x"', b"x") + b"--b--\r\n", "sent as parts called 'files'"),
        (PART % (b"files", b"", b"x") + b"--b--\r\n", "files with a filename each"),
        (FILE + PART % (b"name", b"", b"\xff") + b"--b--\r\n", "not UTF-8"),
        (FILE + PART % (b"name", b"", b"x" * (1 << 20) + b"y") + b"--b--\r\n", "more than 1,048,576 bytes"),
        (b"--b\r\nX: " + b"y" * 2000, "the head of a part is too long"),
        (b"--b\r\n" + b"X: y\r\n" * 9 + FILE[5:], "the head of a part is too long"),
        (b"--b\r\nX: y\r\n\r\nz\r\n--b--\r\n", "no Content-Disposition"),
        (b"--b\r\nContent-Transfer-Encoding: base64\r\n" + FILE[5:], "send its bytes as they are"),
    ],
)
def test_forms_that_are_refused_leave_nothing(http: httpx.Client, tmp_path: Path, body: bytes, says: str) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = http.post("/v1/adapters", content=body, headers=kind)
    assert error_of(answer) == (400, "invalid_body") and says in answer.json()["error"]["message"]
    assert os.listdir(tmp_path / "uploads") == []


def test_a_forms_files_are_refused_as_any_other(http: httpx.Client, tmp_path: Path) -> None:
    for name, refused in (("adapter_model.bin", (422, "unsupported_adapter")), ("../a", (400, "file_name_refused"))):
        assert error_of(http.post("/v1/adapters", files=form_of((CONFIG, b"{}"), (name, b"x")))) == refused
    for boundary in ("", "; boundary=", f"; boundary={'b' * 71}"):
        kind = {"Content-Type": f"multipart/form-data{boundary}"}
        assert error_of(http.post("/v1/adapters", content=FILE, headers=kind)) == (400, "invalid_body")
    assert error_of(http.post("/v1/adapters", files=form_of((WEIGHTS, b"x" * 8_000_001)))) == (413, "upload_too_large")
    other = {"Sec-Fetch-Site": "same-site"}
    assert error_of(http.post("/v1/adapters", files=form_of((CONFIG, b"")), headers=other)) == (400, "cross_site")
    assert os.listdir(tmp_path / "uploads") == []


def test_a_client_that_leaves_its_form_leaves_nothing(url: str, tmp_path: Path) -> None:
    header = "Content-Type: multipart/form-data; boundary=b\r\n"
    connection = begin(url, "POST", "/v1/adapters", 1_000_000, FILE, header)
    eventually(lambda: os.listdir(tmp_path / "uploads"))
    connection.close()
    eventually(lambda: not os.listdir(tmp_path / "uploads"))


def test_a_form_of_nothing_but_almost_boundaries_holds_nobody_up(http: httpx.Client, url: str) -> None:
    """The costliest thing to parse."""
    done, slowest = threading.Event(), [0.0]

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=20) as other:
            while not done.is_set():
                start = time.monotonic()
                other.get("/v1/uploads/x")
                slowest[0] = max(slowest[0], time.monotonic() - start)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        kind = {"Content-Type": "multipart/form-data; boundary=bbbbbbbb"}
        body = FILE.replace(b"--b", b"--bbbbbbbb")[:-4] + b"\r\n--bbbbbbb" * 300_000 + b"\r\n--bbbbbbbb--\r\n"
        assert http.post("/v1/adapters", content=body, headers=kind).status_code == 201
    finally:
        done.set()
        asking.join()
    assert slowest[0] < 0.5  # on a busy machine
