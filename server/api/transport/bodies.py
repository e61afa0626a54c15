"""From the bytes of a request to a checked body: strict JSON, counted before it is built.

A proxy that read the first of two `model` keys would have checked another model than is served. And Python's parser
holds the interpreter while it builds hundreds of thousands of lists.
"""

import asyncio
import json
import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from adapters_store.errors import shown
from adapters_store.strict_json import NotStrictJSON, parse_object
from server.api.protocol.body import Body, BodyLimits
from server.api.protocol.json_text import without_strings
from server.api.service import service_of
from server.errors import ClientLeft, InvalidRequest

INLINE_BYTES = 64 << 10  # parsed at once; longer bodies in a thread, where only the parser's own steps hold others up
MAX_CONTAINERS = 10_000  # lists and objects in one body
MAX_KEYS = 50_000
MAX_STRINGS = 150_000  # keys among them
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")  # of a surrogate pair, which may be whole
_WHOLE = re.compile(r"[0-9]{1,19}")
_NUMBER = re.compile(r"[0-9]{1,19}(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?")  # not nan, inf, 1_000
Parsed = TypeVar("Parsed", bound=Body)


async def read_body(request: Request, kind: type[Parsed], may_be_empty: bool = False) -> Parsed:
    """The body of the request as a `kind`. Raises InvalidRequest, or ClientLeft if it does not come to its end."""
    if (
        may_be_empty
        and request.headers.get("content-length", "0") == "0"
        and "transfer-encoding" not in request.headers
    ):
        return validated(kind, {}, service_of(request).body_limits)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise InvalidRequest(
            "the body must be a JSON object, sent with Content-Type: application/json", code="invalid_body"
        )
    try:
        raw = await request.body()
    except ClientDisconnect:
        raise ClientLeft from None
    value = parse(raw) if len(raw) <= INLINE_BYTES else await asyncio.to_thread(parse, raw)
    return validated(kind, value, service_of(request).body_limits)


Default = TypeVar("Default", float, None)


def number(request: Request, name: str, default: Default, least: float, most: float) -> float | Default:
    """A number of the query. Raises InvalidRequest for one that is out of range, or given twice."""
    given = text(request, name)
    if given is None:
        return default
    value = float(given) if _NUMBER.fullmatch(given) else math.nan
    if not least <= value <= most:
        raise InvalidRequest(
            f"{name} in the query must be a number from {least:,.10g} to {most:,.10g}", param=name, code="invalid_value"
        )
    return value


def check_query(request: Request, *known: str) -> None:
    """Raises InvalidRequest for a word of the query that would change nothing: it may be one that is misspelt."""
    for name in request.query_params:
        if name not in known:
            raise InvalidRequest(
                f"{shown(name)!r} is not a parameter of this route's query; "
                + (f"{', '.join(known)} may be given" if known else "it takes none"),
                param=name[:200],
                code="unknown_parameter",
            )


def count(request: Request, name: str, default: int, least: int, most: int) -> int:
    """A whole number of the query. Raises InvalidRequest as `number` does."""
    given = text(request, name)
    value = default if given is None else int(given) if _WHOLE.fullmatch(given) else None
    if value is None or not least <= value <= most:
        raise InvalidRequest(
            f"{name} in the query must be a whole number from {least:,} to {most:,}", param=name, code="invalid_value"
        )
    return value


def text(request: Request, name: str) -> str | None:
    """A text of the query."""
    given = request.query_params.getlist(name)
    if len(given) > 1:
        raise InvalidRequest(f"{name} is in the query {len(given)} times; once is enough", param=name)
    return given[0] if given else None


def parse(raw: bytes) -> dict[str, Any]:
    """A JSON object. Raises InvalidRequest for anything else, for equal keys, and for more structure than is served."""
    if len(raw) > INLINE_BYTES:
        _refuse_too_many(raw)
    try:
        value = parse_object(raw)
    except NotStrictJSON as error:
        raise InvalidRequest(f"the body {error}", code=error.code) from None
    if _HALF.search(raw):
        _refuse_halves(value)
    return value


def validated(kind: type[Parsed], value: dict[str, Any], limits: BodyLimits) -> Parsed:
    """Raises InvalidRequest with the first problem, by field, and without an echo of what was sent."""
    try:
        return kind.model_validate(value, context=limits)
    except ValidationError as error:
        refusal = _refusal(error, value)
    raise refusal


def _refusal(error: ValidationError, body: dict[str, Any]) -> InvalidRequest:
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    paths = [_path(it["loc"], body, it["type"] == "missing") for it in errors]
    # of a union pydantic says what is wrong with each alternative: the one is meant that was understood furthest
    own = [index for index, path in enumerate(paths) if path[: len(paths[0])] == paths[0]]
    furthest = max(own, key=lambda it: len(paths[it]))
    path, told = paths[furthest], errors[furthest]["msg"]
    if errors[furthest]["type"] in ("model_type", "model_attributes_type", "dict_type"):
        told = "Input should be an object"  # pydantic would name our class
    place = ".".join(map(str, path))[:200] or "the body"
    return InvalidRequest(f"{place}: {told}", param=str(path[0])[:200] if path else None, code="invalid_value")


def _path(steps: Sequence[str | int], body: Any, is_missing: bool) -> list[str | int]:
    """Those that lead somewhere in the body, and to what it lacks: pydantic names also the alternatives of a union.
    (Tags are no names of fields, so that none is taken for one.)"""
    path: list[str | int] = []
    for place, step in enumerate(steps, 1):
        if isinstance(step, str) and isinstance(body, dict) and step in body:
            body = body[step]
        elif isinstance(step, int) and isinstance(body, list) and step < len(body):
            body = body[step]
        elif not (is_missing and place == len(steps)):
            continue
        if str(step).isidentifier() or str(step).isdecimal():
            path.append(step)
    return path


def _refuse_halves(value: dict[str, Any]) -> None:
    """Half of a surrogate pair has no bytes: it could be neither tokenized nor answered, and would match nothing."""
    for name, it in value.items():
        try:
            name.encode()
            json.dumps(it, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            shown = name.encode(errors="replace").decode()[:100]
            raise InvalidRequest(
                f"{shown} is not valid Unicode: it holds half of a surrogate pair", param=shown, code="invalid_value"
            ) from None


def _refuse_too_many(raw: bytes) -> None:
    strings = (raw.count(b'"') - raw.count(b'\\"')) // 2  # at least so many: a quote behind a backslash may end one too
    structure = b"" if strings > MAX_STRINGS else without_strings(raw)
    containers = structure.count(b"[") + structure.count(b"{")
    keys, strings = structure.count(b":"), max(strings, structure.count(b'"'))
    if containers > MAX_CONTAINERS or keys > MAX_KEYS or strings > MAX_STRINGS:
        raise InvalidRequest(
            f"the body has {containers:,} lists and objects, {keys:,} keys and {strings:,} strings; at most "
            f"{MAX_CONTAINERS:,}, {MAX_KEYS:,} and {MAX_STRINGS:,} are read",
            code="invalid_body",
        )
