"""Which references the operator allows. Decided on the text alone, before anything is imported or connected to.

A reference is `source:segment/segment…`, for some sources with `@revision`. Its alphabet is small: no `..`, no empty
segment, no second colon, nothing that an address could be made of. Patterns are written in the same alphabet with `*`
(within a segment) and `**` (one segment or more), and say nothing of revisions.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from adapters_store.errors import SourceRefused, shown

Allowed = Mapping[str, tuple[str, ...]]  # patterns by source
_SOURCE = r"[a-z][a-z0-9_-]{0,31}"
_SEGMENT = r"(?!\.)(?!.*\.\.)[A-Za-z0-9._=+-]{1,128}"
_segment = re.compile(_SEGMENT)
_pattern_segment = re.compile(r"(?!\.)(?!.*\.\.)[A-Za-z0-9._=+*-]{1,128}")
_source = re.compile(_SOURCE)
MAX_CHARS = 1024


class Reference(NamedTuple):
    """`rest` is what the source is asked for: `target`, with `@revision` if there is one."""

    source: str
    target: str
    rest: str


def parse_allowed(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Patterns such as `hub:my-org/*`. Raises ValueError with what is wrong, for the operator."""
    allowed: dict[str, tuple[str, ...]] = {}
    for text in texts:
        source, colon, pattern = text.partition(":")
        if not colon or not _source.fullmatch(source):
            raise ValueError(f"{text!r} is no pattern of a source: write SOURCE:PATTERN, such as hub:my-org/*")
        if not all(map(_is_pattern_segment, pattern.split("/"))):
            raise ValueError(
                f"{text!r} is no pattern of a source: names of A-Z a-z 0-9 . _ = + - separated by /, with * for any "
                "part of a name and ** for one name or more; without a revision"
            )
        allowed[source] = (*allowed.get(source, ()), pattern)
    return allowed


def allowed_reference(text: str, allowed: Allowed) -> Reference:
    """What a client asks for, if the operator allows it. Raises SourceRefused."""
    reference = _parsed(text)
    patterns = allowed.get(reference.source, ())
    if not any(_as_regex(pattern).fullmatch(reference.target) for pattern in patterns):
        raise SourceRefused(
            f"{shown(text)!r} is not among what this server may fetch, which is for its operator to say; the adapter's "
            "files can be uploaded instead"
        )
    return reference


def _parsed(text: str) -> Reference:
    source, _, rest = text.partition(":")
    target, at, revision = rest.partition("@")
    is_sound = (
        len(text) <= MAX_CHARS
        and _source.fullmatch(source)
        and all(map(_segment.fullmatch, target.split("/")))
        and (not at or all(map(_segment.fullmatch, revision.split("/"))))
    )
    if not is_sound:
        raise SourceRefused(
            f"{shown(text)!r} is no reference to an adapter elsewhere: write hub:org/name@revision or "
            "s3:bucket/prefix, in A-Z a-z 0-9 . _ = + - and /"
        )
    return Reference(source, target, rest)


def _is_pattern_segment(segment: str) -> bool:
    return segment == "**" or (_pattern_segment.fullmatch(segment) is not None and "**" not in segment)


def _as_regex(pattern: str) -> re.Pattern[str]:
    segments = (
        "[^/]+(?:/[^/]+)*" if segment == "**" else "[^/]*".join(map(re.escape, segment.split("*")))
        for segment in pattern.split("/")
    )
    return re.compile("/".join(segments))
