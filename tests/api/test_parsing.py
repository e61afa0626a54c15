"""From bytes to a checked body, without a server: what is counted before it is built, and what is no JSON of ours."""

import asyncio
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st

from server.api.protocol.adapters import AdapterBody
from server.api.protocol.body import BodyLimits
from server.api.protocol.completions import CompletionBody
from server.api.transport import bodies
from server.api.transport.bodies import INLINE_BYTES, parse, read_body
from server.errors import ClientLeft, InvalidRequest

LIMITS = BodyLimits(max_model_len=10, vocab_size=100, max_prompts=2, max_n=2, max_stop=2, max_stop_chars=3,
                    max_messages=2, max_parts=2, max_logprobs=5, max_tools=2)  # fmt: skip


def request(raw: bytes, content_type: str | None = "application/json", leaves: bool = False) -> Request:
    headers = [] if content_type is None else [(b"content-type", content_type.encode())]
    app = SimpleNamespace(state=SimpleNamespace(service=SimpleNamespace(body_limits=LIMITS)))

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"} if leaves else {"type": "http.request", "body": raw}

    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers, "app": app}, receive)


def read(raw: bytes, kind: Any = AdapterBody, **how: Any) -> Any:
    return asyncio.run(read_body(request(raw, **how), kind))


# -- JSON, and only that ---


@pytest.mark.parametrize(
    ("raw", "code", "says"),
    [
        (b"\xff\xfe", "invalid_json", "the body is not UTF-8"),
        (b"{", "invalid_json", "the body is not valid JSON"),
        (b"[" * 50_000, "invalid_json", "the body is not valid JSON"),
        (b'{"a": NaN}', "invalid_json", "the body holds NaN, which is not JSON"),
        (b'{"a": -Infinity}', "invalid_json", "the body holds -Infinity, which is not JSON"),
        (b"[]", "invalid_body", "the body must be a JSON object, not list"),
        (b"null", "invalid_body", "the body must be a JSON object, not NoneType"),
        (b'{"a": 1, "b": 2, "a": 1}', "duplicate_key", "the body has the key 'a' twice in one object"),
        (b'{"x": [{"b": 1, "b": 1}]}', "duplicate_key", "the body has the key 'b' twice in one object"),
    ],
)
def test_what_another_parser_might_read_otherwise_is_refused(raw: bytes, code: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        parse(raw)
    assert refusal.value.code == code and refusal.value.message == says


def test_one_key_in_two_objects_is_no_key_twice() -> None:
    assert parse(b'{"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}]}') == {"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}]}


def test_a_long_key_is_not_repeated_in_full() -> None:
    key = b'"' + b"k" * 5000 + b'"'
    with pytest.raises(InvalidRequest) as refusal:
        parse(b"{" + key + b":1," + key + b":1}")
    assert len(refusal.value.message) < 200


# -- counted before it is built ---

_JSON = st.recursive(
    st.none() | st.integers() | st.text(alphabet='ab"\\[]{}:,é', max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


def count(value: Any) -> Iterator[str]:
    """What a parser would build of it."""
    if isinstance(value, str):
        yield "string"
    if isinstance(value, list | dict):
        yield "container"
        for item in value:
            if isinstance(value, dict):
                yield from ("key", "string")
                item = value[item]
            yield from count(item)


def refused_counts(raw: bytes) -> tuple[int, int, int] | None:
    try:
        bodies._refuse_too_many(raw)
    except InvalidRequest as error:
        words = error.message.replace(",", "").split()
        return int(words[3]), int(words[7]), int(words[10])
    return None


@given(_JSON, st.booleans())
def test_the_counts_are_those_of_what_would_be_built(value: Any, ascii_only: bool) -> None:
    raw = json.dumps({"k": value}, ensure_ascii=ascii_only).encode()
    kinds = list(count({"k": value}))
    built = {kind: kinds.count(kind) for kind in ("container", "key", "string")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "MAX_CONTAINERS", built["container"] - 1)
        assert refused_counts(raw) == tuple(built.values())
        for kind, limit in (("container", "MAX_CONTAINERS"), ("key", "MAX_KEYS"), ("string", "MAX_STRINGS")):
            patch.setattr(bodies, limit, built[kind])
        assert refused_counts(raw) is None  # as many as may
        for kind, limit in (("key", "MAX_KEYS"), ("string", "MAX_STRINGS")):
            patch.setattr(bodies, limit, built[kind] - 1)
            assert refused_counts(raw) is not None
            patch.setattr(bodies, limit, built[kind])


@pytest.mark.parametrize("raw", [b'{"a": "', b'{"a": "\\', b'{"a": "\\"', b'"' * 5, b'\\"' * 9])
def test_what_is_not_whole_is_counted_without_being_taken_for_whole(raw: bytes) -> None:
    bodies._refuse_too_many(raw)
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        parse(raw)


def test_only_long_bodies_are_counted() -> None:
    """Short ones cost nothing; a long one of too many lists is refused before any of them is made."""
    short = b'{"a": ' + b"[" * 12_000 + b"]" * 12_000 + b"}"
    assert len(short) < INLINE_BYTES
    with pytest.raises(InvalidRequest, match="not valid JSON"):  # too deep for the parser
        parse(short)
    long = b'{"a": [' + b"[]," * 30_000 + b"[]]}"
    with pytest.raises(InvalidRequest, match="the body has 30,003 lists and objects, 1 keys and 1 strings") as refusal:
        parse(long)
    assert refusal.value.code == "invalid_body"


# -- the body of a request ---


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON ; charset=utf-8"])
def test_a_sound_body_becomes_what_was_asked_for(content_type: str) -> None:
    body = read(b'{"name": "n", "path": "p"}', content_type=content_type)
    assert (body.name, body.path) == ("n", "p")


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "json"])
def test_a_body_that_is_not_declared_as_json_is_not_read(content_type: str | None) -> None:
    """A browser sends those three across origins without asking; this one it asks about."""
    with pytest.raises(InvalidRequest, match="Content-Type: application/json") as refusal:
        read(b'{"name": "n", "path": "p"}', content_type=content_type)
    assert refusal.value.code == "invalid_body"


def test_a_client_that_leaves_in_the_middle_of_its_body_is_gone() -> None:
    with pytest.raises(ClientLeft):
        read(b"", leaves=True)


def test_a_long_body_is_parsed_as_a_short_one_is() -> None:
    padding = b" " * INLINE_BYTES
    assert read(b'{"name": "n", "path": "p"' + padding + b"}").name == "n"
    with pytest.raises(InvalidRequest, match="not valid JSON"):
        read(b'{"name": "n", "path": "p"' + padding)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"name": 5, "path": "p"}, "name", "invalid_value"),
        ({"name": "n", "path": ""}, "path", "invalid_value"),
        ({"name": "n", "path": "x" * 4097}, "path", "invalid_value"),
        ({"name": "n", "path": "p", "force": "s3cret"}, "force", "unknown_parameter"),
    ],
)
def test_the_first_field_that_is_wrong_is_named_and_nothing_of_it_is_repeated(
    body: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        read(json.dumps(body).encode())
    assert (refusal.value.param, refusal.value.code) == (param, code)
    assert refusal.value.message.startswith((param, repr(param))) and "s3cret" not in refusal.value.message


def test_the_limits_are_the_servers() -> None:
    at_most = {"model": "m", "prompt": [[1] * 10, [99]], "n": 2, "stop": ["abc", "d"]}
    assert read(json.dumps(at_most).encode(), CompletionBody).stops == ["abc", "d"]
    for field, value in (("prompt", [[1]] * 3), ("prompt", [1] * 11), ("prompt", [100]), ("n", 3),
                         ("stop", ["a"] * 3), ("stop", "abcd")):  # fmt: skip
        with pytest.raises(InvalidRequest) as refusal:
            read(json.dumps(at_most | {field: value}).encode(), CompletionBody)
        assert refusal.value.param == field
