"""Adapters of a running server, over HTTP. Python's own client: nothing else is installed for it."""

import http.client
import json
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import OpenerDirector, ProxyHandler, Request, build_opener

from server.commands.work import Told, Wanted
from server.exits import EXIT_CONFIG, EXIT_FAILED, EXIT_REFUSED, Failed

_READ_TIMEOUT_S = 60.0  # changes and checks take as long as they take
_PAGE = 1000


class OverHTTP:
    """`is_own`: the address is one that a server on this machine told, which no proxy stands before."""

    def __init__(self, url: str, is_own: bool = False) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._opener: OpenerDirector = build_opener(*([ProxyHandler({})] if is_own else []))
        self.where = f"the server at {self._url}"

    def adapters(self) -> list[Told]:
        return list(self._pages("/v1/adapters"))

    def aliases(self) -> list[Told]:
        told: list[Told] = self._ask("GET", "/v1/aliases", timeout_s=_READ_TIMEOUT_S)["data"]
        return told

    def add(self, wanted: Wanted) -> Told:
        body: Told = {"name": wanted.name, "path": str(wanted.path), "verify": wanted.verify}
        body |= {"ignore_keys": list(wanted.ignore_keys)} | ({"manifest": wanted.manifest} if wanted.manifest else {})
        if wanted.replace:
            return self._ask("PUT", f"/v1/adapters/{_quoted(wanted.name)}", body)
        return self._ask("POST", "/v1/adapters", body)

    def remove(self, name: str, drain_s: float | None) -> Told:
        query = "" if drain_s is None else f"?{urlencode({'drain_s': f'{drain_s:.9g}'})}"
        return self._ask("DELETE", f"/v1/adapters/{_quoted(name)}{query}")

    def collect(self) -> Told:
        return self._ask("POST", "/v1/store/gc")

    def verify(self, model: str) -> Told:
        return self._ask("POST", f"/v1/adapters/{_quoted(model)}/verify")

    def log(self) -> Iterator[Told]:
        return self._pages("/v1/store/log")

    def close(self) -> None:
        self._opener.close()

    def _pages(self, path: str) -> Iterator[Told]:
        after: object = None
        while True:
            query = {"limit": _PAGE} | ({} if after is None else {"after": after})
            page = self._ask("GET", f"{path}?{urlencode(query)}", timeout_s=_READ_TIMEOUT_S)
            yield from page["data"]
            if not page["has_more"]:
                return
            after = page["data"][-1]["id"]

    def _ask(self, method: str, path: str, body: Told | None = None, timeout_s: float | None = None) -> Told:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        data = json.dumps(body).encode() if body is not None else b"" if method != "GET" else None
        request = Request(self._url + path, data, headers, method=method)
        try:
            with self._opener.open(request, timeout=timeout_s) as response:
                return self._object(response.read())
        except HTTPError as error:
            with error:
                raise self._refusal(error.code, error.read()) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise Failed(f"{self.where} does not answer ({reason}); see whether it runs there", EXIT_FAILED) from None

    def _object(self, raw: bytes) -> Told:
        try:
            value = json.loads(raw)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Failed(f"{self.where} answers what Heddle does not; see whether the URL is right", EXIT_FAILED)
        return value

    def _refusal(self, status: int, raw: bytes) -> Failed:
        error: Any = self._object(raw).get("error")
        if not isinstance(error, dict):
            return Failed(f"{self.where} answers {status}; see whether the URL is right", EXIT_FAILED)
        if error.get("code") in ("store_full", "store_failed"):
            end = EXIT_CONFIG
        else:
            end = EXIT_REFUSED if 400 <= status < 500 and error.get("code") else EXIT_FAILED
        return Failed(str(error.get("message")), end)


def _quoted(name: str) -> str:
    return quote(name, safe="")
