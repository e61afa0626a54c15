"""Why an adapter is refused.

    AdapterError
    ├── AdapterNotFound      no adapter of that name
    ├── AdapterConflict      the name is taken by other weights, or reserved
    ├── InvalidAdapterName   the name cannot be used in a URL or a metric label
    ├── AdapterPathRefused   the path lies outside the directories that the operator allowed
    ├── InvalidAdapter       the files are broken, incomplete, not an adapter at all, or cannot be verified in time
    │   └── Unforeseen       verification failed in a way that nobody had thought of
    ├── UnsupportedAdapter   a sound adapter of a kind that cannot be served exactly
    └── CoverageError        tensors that do not bind to this base model, or tensors that are missing

Messages name the tensor, key or file, carry the numbers and say what to do. They never carry what a configuration
holds, beyond booleans, numbers and words of PEFT's own: a path may lead to a file that is nobody's adapter.
"""

import traceback
from collections.abc import Sequence

MAX_MESSAGE_BYTES = 2000
_MAX_NAME = 120  # characters of a tensor's, key's or file's name
_PROBLEMS_SHOWN = 6
_REMEDIES_SHOWN = 3


def clean(text: str, max_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """Text of strangers as it may be shown: nothing that a terminal or a log would obey, and not too much of it.

    What is not printable (control characters, escape sequences, marks that turn the direction of writing, halves of
    surrogate pairs) is written as its escape.
    """
    kept = text[:max_bytes]
    if not kept.isprintable():
        kept = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in kept)
    raw = kept.encode()
    if len(text) <= max_bytes and len(raw) <= max_bytes:
        return kept
    return raw[: max_bytes - 3].decode(errors="ignore") + "…"


def shown(name: str) -> str:
    """A name out of an adapter's files, short enough for a message that shows several."""
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"


class AdapterError(Exception):
    """Base of all refusals; the message is meant for the person who sent the adapter."""

    def __init__(self, message: str) -> None:
        super().__init__(clean(message))


class AdapterNotFound(AdapterError):
    def __init__(self, name: str) -> None:
        super().__init__(f"no adapter is named {shown(name)!r}")


class AdapterConflict(AdapterError):
    pass


class InvalidAdapterName(AdapterError):
    pass


class AdapterPathRefused(AdapterError):
    pass


class InvalidAdapter(AdapterError):
    pass


class Unforeseen(InvalidAdapter):
    """The adapter's fault until somebody shows otherwise. `details` is a traceback for the log."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"the adapter could not be verified ({type(error).__name__}); the server's log says more")
        self.details = clean("".join(traceback.format_exception(error)[-12:]), 8000)


class UnsupportedAdapter(AdapterError):
    pass


class CoverageError(AdapterError):
    """Not every tensor of the adapter binds to a module of the base with the right shape, or some are missing."""


def coverage_error(problems: Sequence[str], bound: int, total: int, remedies: Sequence[str] = ()) -> CoverageError:
    """`problems` are lines, of which the message shows the first few. `total` counts the tensors of the files and
    `bound` those that fit; `remedies` say what to do, each once."""
    lines = "; ".join(problems[:_PROBLEMS_SHOWN])
    if len(problems) > _PROBLEMS_SHOWN:
        lines += f"; and {len(problems) - _PROBLEMS_SHOWN} more"
    if bound < total:
        fit = f"{total - bound} of the adapter's tensors do not fit this base ({bound} do): "
    else:
        fit = f"all {total} tensors of the adapter fit this base, but it is not whole: "
    todo = "".join(f". To do: {remedy}" for remedy in remedies[:_REMEDIES_SHOWN])
    room = MAX_MESSAGE_BYTES - len((fit + todo).encode())  # what to do is said whatever the names' length
    return CoverageError(f"{fit}{clean(lines, room)}{todo}")
