"""A hub and an object store on this machine, with as many routes as their clients need, and every request noted."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Double:
    """`files` are bytes by name. What it says of a file's size is `sizes`, where that has the name."""

    def __init__(self, files: Mapping[str, bytes], place: str) -> None:
        self.files, self.place = dict(files), place
        self.sizes: dict[str, int] = {}
        self.id = place  # the name under which a hub answers
        self.delay_s = 0.0  # before each piece of a file
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.url = ""

    def size(self, name: str) -> int:
        return self.sizes.get(name, len(self.files[name]))

    def downloads(self) -> list[str]:
        return [line for line in self.asked if line.startswith("GET") and line.endswith(tuple(self.files))]


class _Answers(BaseHTTPRequestHandler):
    double: Double
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.double.asked.append(f"{self.command} {unquote(self.path)}")
        self.double.tokens.add(self.headers.get("Authorization"))
        self.route()

    def route(self) -> None:
        raise NotImplementedError

    def say(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for start in range(0, len(body), 1000):
            time.sleep(self.double.delay_s)
            try:
                self.wfile.write(body[start : start + 1000])
            except ConnectionError:
                return


class _Hub(_Answers):
    def route(self) -> None:
        path, double = unquote(urlsplit(self.path).path), self.double
        if path in (f"/api/models/{double.place}", f"/api/models/{double.place}/revision/{COMMIT}",
                    f"/api/models/{double.place}/revision/v1"):  # fmt: skip
            files = [{"rfilename": name, "size": double.size(name)} for name in double.files]
            info = {"_id": "1", "id": double.id, "modelId": double.id, "sha": COMMIT, "siblings": files, "tags": [],
                    "private": False, "downloads": 0, "likes": 0}  # fmt: skip
            self.say(200, json.dumps(info).encode(), Content_Type="application/json")
            return
        name = path.removeprefix(f"/{double.place}/resolve/{COMMIT}/")
        if name in double.files:
            body = double.files[name]
            tag = f'"{hashlib.sha256(body).hexdigest()}"'
            self.say(200, body, ETag=tag, X_Repo_Commit=COMMIT)
        elif path.startswith(f"/api/models/{double.place}/revision/"):
            self.say(404, b"{}", X_Error_Code="RevisionNotFound")
        else:
            self.say(404, b"{}", X_Error_Code="RepoNotFound")


class _ObjectStore(_Answers):
    def route(self) -> None:
        split, double = urlsplit(self.path), self.double
        bucket, _, prefix = double.place.partition("/")
        path, query = unquote(split.path).strip("/"), parse_qs(split.query)
        if path == bucket and query.get("list-type") == ["2"]:
            asked = query.get("prefix", [""])[0]
            found = [name for name in double.files if f"{prefix}/{name}".startswith(asked)]
            items = "".join(
                f"<Contents><Key>{escape(f'{prefix}/{name}')}</Key><Size>{double.size(name)}</Size>"
                f"<ETag>&quot;{self.tag(name)}&quot;</ETag></Contents>"
                for name in found
                if "/" not in name
            )
            body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>"
            self.say(200, body.encode(), Content_Type="application/xml")
        elif path.removeprefix(f"{double.place}/") in double.files:
            name = path.removeprefix(f"{double.place}/")
            self.say(200, double.files[name], ETag=f'"{self.tag(name)}"')
        else:
            code = "NoSuchKey" if path.startswith(f"{bucket}/") else "NoSuchBucket"
            self.say(404, f"<Error><Code>{code}</Code><Message>{double.url}</Message></Error>".encode())

    def tag(self, name: str) -> str:
        return hashlib.md5(self.double.files[name], usedforsecurity=False).hexdigest()


@contextmanager
def _served(double: Double, kind: type[_Answers]) -> Iterator[Double]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (kind,), {"double": double}))
    server.daemon_threads = True
    double.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@contextmanager
def hub(files: Mapping[str, bytes], repo: str = "org/name") -> Iterator[Double]:
    with _served(Double(files, repo), _Hub) as double:
        yield double


@contextmanager
def object_store(files: Mapping[str, bytes], place: str = "bucket/team/a") -> Iterator[Double]:
    with _served(Double(files, place), _ObjectStore) as double:
        yield double
