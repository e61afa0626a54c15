"""JSON that two parsers could read in two ways is refused, and so is a file too large to be a configuration."""

import json
from pathlib import Path

import pytest

from adapters_store import json_file
from adapters_store.errors import InvalidAdapter
from adapters_store.files import Folder
from adapters_store.json_file import read_json
from adapters_store.strict_json import NotStrictJSON, parse_object


@pytest.mark.parametrize(
    ("raw", "code", "says"),
    [
        (b"\xff", "invalid_json", "is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "invalid_json", "is not UTF-8"),
        (b"", "invalid_json", "is not valid JSON"),
        (b"{} {}", "invalid_json", "is not valid JSON"),
        (b"[" * 100_000, "invalid_json", "is not valid JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "invalid_json", "is not valid JSON"),
        (b'{"a": NaN}', "invalid_json", "holds NaN, which is not JSON"),
        (b'{"a": [Infinity]}', "invalid_json", "holds Infinity, which is not JSON"),
        (b"3", "invalid_body", "must be a JSON object, not int"),
        (b"[{}]", "invalid_body", "must be a JSON object, not list"),
        (b'{"a": 1, "b": 2, "b": 3, "b": 4}', "duplicate_key", "has the key 'b' twice in one object"),
        (b'[{"a": {"c": 1, "c": 1}}]', "duplicate_key", "has the key 'c' twice in one object"),
    ],
)
def test_what_is_not_one_object_in_one_reading_is_refused(raw: bytes, code: str, says: str) -> None:
    with pytest.raises(NotStrictJSON) as refusal:
        parse_object(raw)
    assert (str(refusal.value), refusal.value.code) == (says, code)


def test_an_object_is_read_as_it_was_written() -> None:
    value = {"a": [1, 2.5, None, True, "ü\ud83c"[:1]], "b": {"a": {}}}
    assert parse_object(json.dumps(value).encode()) == value
    assert list(parse_object(b'{"b": 1, "a": 2}')) == ["b", "a"]


def test_a_key_is_shown_in_part() -> None:
    key = "k" * 1000
    with pytest.raises(NotStrictJSON, match=f"'{'k' * 100}' twice"):
        parse_object(f'{{"{key}": 1, "{key}": 1}}'.encode())


def test_a_file_is_read_up_to_the_limit_and_refused_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_file, "MAX_JSON_BYTES", 1000)
    for size in (1000, 1001):
        (tmp_path / f"{size}.json").write_text("{" + " " * (size - 2) + "}")
    (tmp_path / "broken.json").write_text("{")
    with Folder(str(tmp_path), (str(tmp_path.resolve()),)) as folder:
        assert read_json(folder, "1000.json") == {}
        with pytest.raises(
            InvalidAdapter,
            match=r"^1001\.json has 1,001 bytes; at most 1,000 are read: leave out what the adapter does not need$",
        ):
            read_json(folder, "1001.json")
        with pytest.raises(
            InvalidAdapter, match=r"^broken\.json is not valid JSON; write it again, as one JSON object in UTF-8$"
        ):
            read_json(folder, "broken.json")
