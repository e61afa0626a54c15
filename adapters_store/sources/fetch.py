"""Fetching one adapter, in the process that does it for the server: `python -m adapters_store.sources.fetch`.

Plug-ins run here and nowhere else: what they wait for, hang in or leak ends with the process (fetcher.py kills it).
"""

import errno
import os
import re
import resource
import traceback
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

import msgspec

from adapters_store.errors import (
    AdapterError,
    InvalidAdapter,
    SourceFailed,
    SourceNotFound,
    SourceRefused,
    StoreFull,
    UnsupportedAdapter,
    UploadTooLarge,
    clean,
)
from adapters_store.sources import GROUP, Fetched, FetchLimits, Source
from adapters_store.worker_process import limit, serve

MAX_MEMORY_BYTES = 4 << 30  # of addresses, most of them libraries' and threads' stacks
_ADDRESS = re.compile(r"[a-z0-9+]+://\S+", re.IGNORECASE)


class FetchJob(msgspec.Struct, frozen=True):
    """`into` is an empty directory. `cpu_seconds` are what the process may spend at most."""

    source: str
    reference: str
    into: str
    limits: FetchLimits
    cpu_seconds: int


Kind = Literal[
    "SourceRefused", "SourceNotFound", "SourceFailed", "StoreFull", "UploadTooLarge", "UnsupportedAdapter",
    "InvalidAdapter",
]  # fmt: skip
_KINDS: dict[str, type[AdapterError]] = {
    kind.__name__: kind
    for kind in (
        SourceRefused, SourceNotFound, SourceFailed, StoreFull, UploadTooLarge, UnsupportedAdapter, InvalidAdapter,
    )
}  # fmt: skip


class NotFetched(msgspec.Struct, frozen=True, tag=True):
    """`details` is a traceback for the log, where the failure was not foreseen."""

    kind: Kind
    message: str
    details: str = ""

    def error(self) -> AdapterError:
        return _KINDS[self.kind](self.message)


Answer = Fetched | NotFetched


def load(name: str) -> Source:
    """The plug-in of that name. Raises SourceFailed where there is none, or two that differ."""
    values = {point.value: point for point in entry_points(group=GROUP, name=name)}
    if len(values) != 1:
        count = "no plug-in" if not values else f"{len(values)} plug-ins"
        raise SourceFailed(f"this server has {count} for {name}:, which its operator has allowed; it needs one")
    source: Source = next(iter(values.values())).load()()
    return source


def fetch(job: FetchJob) -> Answer:
    try:
        return load(job.source).fetch(job.reference, Path(job.into), job.limits)
    except AdapterError as error:
        kind = next((it.__name__ for it in type(error).__mro__ if it.__name__ in _KINDS), "SourceFailed")
        return NotFetched(msgspec.convert(kind, Kind), str(error))
    except Exception as error:
        return _unforeseen(error, job)


def _unforeseen(error: Exception, job: FetchJob) -> NotFetched:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return NotFetched("StoreFull", "the server's disk for adapters is full; try again later")
    if number == errno.EFBIG:
        return NotFetched("UploadTooLarge", f"a file has more than the {job.limits.max_bytes:,} bytes that are fetched")
    # addresses may be signed, which makes them keys
    details = _ADDRESS.sub("<address>", "".join(traceback.format_exception(error)[-12:]))
    said = f"the adapter could not be fetched from {job.source} ({type(error).__name__}); the server's log says more"
    return NotFetched("SourceFailed", said, clean(details, 8000))


def _answer_to(frame: bytes) -> bytes:
    job = msgspec.msgpack.decode(frame, type=FetchJob)
    limit(resource.RLIMIT_CPU, job.cpu_seconds)
    limit(resource.RLIMIT_FSIZE, job.limits.max_bytes)
    return msgspec.msgpack.encode(fetch(job))


def main() -> None:
    limit(resource.RLIMIT_AS, MAX_MEMORY_BYTES)
    answers_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a plug-in prints is for the log, and no answer
    serve(_answer_to, answers_out)


if __name__ == "__main__":
    main()
