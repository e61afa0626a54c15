"""JSON as strangers send it, in adapters and in requests: one object, UTF-8, no key twice, nothing that is not JSON.

Python's parser takes UTF-16 and NaN, and lets the last of two equal keys win, where another parser of the same bytes
may take the first.
"""

import json
from collections import Counter
from typing import Any, Literal

Code = Literal["invalid_json", "duplicate_key", "invalid_body"]


class NotStrictJSON(ValueError):
    """The message says what is wrong as a predicate ("is not UTF-8"), for the caller to say of what."""

    def __init__(self, message: str, code: Code = "invalid_json") -> None:
        super().__init__(message)
        self.code: Code = code


def parse_object(raw: bytes) -> dict[str, Any]:
    """Raises NotStrictJSON."""
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except NotStrictJSON:
        raise
    except UnicodeDecodeError:
        raise NotStrictJSON("is not UTF-8") from None
    except (ValueError, RecursionError):
        raise NotStrictJSON("is not valid JSON") from None
    if not isinstance(value, dict):
        raise NotStrictJSON(f"must be a JSON object, not {type(value).__name__}", "invalid_body")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise NotStrictJSON(f"has the key {twice[:100]!r} twice in one object", "duplicate_key")
    return found


def _no_constant(token: str) -> Any:
    raise NotStrictJSON(f"holds {token}, which is not JSON")
