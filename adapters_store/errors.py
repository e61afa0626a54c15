"""Why an adapter is refused.

    AdapterError
    ├── AdapterNotFound      no adapter of that name
    ├── AdapterConflict      the name is taken by other weights, or reserved
    │   └── CatalogFull      as many adapters are registered as may be
    ├── RevisionChanged      the name does not mean the revision that the caller expected
    ├── InvalidAdapterName   the name cannot be used in a URL or a metric label
    ├── InvalidAlias         an alias without a target that could be served
    ├── InvalidManifest      what is said of the adapter beside its weights (a chat template, say) cannot be used
    ├── AdapterPathRefused   the path lies outside the directories that the operator allowed
    ├── InvalidAdapter       the files are broken, incomplete, not an adapter at all, or cannot be verified in time
    │   ├── GivenUp          verification took too long, or more memory than it may: nothing is known of the files
    │   ├── NoAdapterThere   the path leads to no directory, or to one that holds no adapter
    │   └── Unforeseen       verification failed in a way that nobody had thought of
    ├── UnsupportedAdapter   a sound adapter of a kind that cannot be served exactly
    ├── CoverageError        tensors that do not bind to this base model, or tensors that are missing
    ├── WrongBase            the manifest demands another base model than this one
    ├── AdapterQuarantined   it is registered and not served: its weights were found wanting
    ├── FileNameRefused      no file of an adapter has such a name
    ├── UploadNotFound       no upload of that id is under way
    ├── UploadConflict       the file has another size than the client believes, or another request writes it now
    ├── UploadTooLarge       more bytes or files than an adapter may have
    ├── SourceRefused        the operator has not allowed that place
    ├── SourceNotFound       the place has no such adapter, or does not show it to this server
    ├── SourceFailed         the place cannot be reached, is too slow, or answers what makes no sense
    ├── StoreFailed          the store cannot be written or read
    │   ├── StoreLocked      another server or command writes it now
    │   └── StoreUnfit       it is a newer Heddle's, or none
    └── StoreFull            there is no room on the disk for it

And why a base model's directory is: BaseUnreadable, which is no adapter's fault and ends the start.

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


class BaseUnreadable(Exception):
    """The base model's own files do not say which model it is; the message is meant for whoever starts the server."""

    def __init__(self, message: str) -> None:
        super().__init__(clean(message))


class AdapterNotFound(AdapterError):
    def __init__(self, name: str) -> None:
        super().__init__(f"no adapter is named {shown(name)!r}")


class AdapterConflict(AdapterError):
    pass


class CatalogFull(AdapterConflict):
    pass


class RevisionChanged(AdapterError):
    pass


class InvalidAdapterName(AdapterError):
    pass


class InvalidAlias(AdapterError):
    pass


class InvalidManifest(AdapterError):
    pass


class AdapterPathRefused(AdapterError):
    pass


class InvalidAdapter(AdapterError):
    pass


class GivenUp(InvalidAdapter):
    pass


class NoAdapterThere(InvalidAdapter):
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


class WrongBase(AdapterError):
    pass


class AdapterQuarantined(AdapterError):
    pass


class FileNameRefused(AdapterError):
    pass


class UploadNotFound(AdapterError):
    def __init__(self, message: str = "no such upload is under way; it may have been deleted, or swept away") -> None:
        super().__init__(message)


class UploadConflict(AdapterError):
    """`offset` is where the file ends now, and where the next piece belongs."""

    def __init__(self, message: str, offset: int = 0) -> None:
        super().__init__(message)
        self.offset = offset


class UploadTooLarge(AdapterError):
    pass


class SourceRefused(AdapterError):
    pass


class SourceNotFound(AdapterError):
    pass


class SourceFailed(AdapterError):
    pass


class StoreFailed(AdapterError):
    pass


class StoreLocked(StoreFailed):
    pass


class StoreUnfit(StoreFailed):
    """Another place would not be the same: a newer Heddle wrote it, or it is no store."""


class StoreFull(AdapterError):
    pass


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
