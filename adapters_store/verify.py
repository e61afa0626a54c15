"""Verification, and the process that does it for the server: `python -m adapters_store.verify`.

A directory is read that somebody else filled: a parser may take minutes over it, a regular expression may never end,
a file may be endless. So the server has this done by a process that it can kill (verifier.py). Jobs come in and answers
go out as msgspec messages, each behind its length in eight bytes. The process limits its own memory, and, lest it
outlive its parent, its time on the processor.
"""

import math
import os
import resource
import sys
from typing import BinaryIO, Literal

import msgspec

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import (
    AdapterError,
    AdapterPathRefused,
    CoverageError,
    InvalidAdapter,
    Unforeseen,
    UnsupportedAdapter,
)
from adapters_store.files import Folder
from adapters_store.formats import read_adapter
from adapters_store.parts import AdapterPackage
from adapters_store.room import Room

MAX_MEMORY_BYTES = 512 << 20  # of addresses: Python and numpy take 110 MB, an adapter a few tens
MAX_ANSWER_BYTES = 64 << 20
READY = b"\n"  # written once, when all is imported


class Job(msgspec.Struct, frozen=True):
    """`roots` are absolute and free of links; a relative path is taken below the first. `cpu_seconds` are what the
    process may spend on it at most. `ignore_keys` are unknown keys of the configuration to pass over."""

    path: str
    roots: tuple[str, ...]
    base: BaseSpec
    room: Room | None = None
    cpu_seconds: int = 60
    ignore_keys: tuple[str, ...] = ()


class Verified(msgspec.Struct, frozen=True, tag=True):
    """`root` is the directory's place below its adapter root, for people."""

    package: AdapterPackage
    root: str


Kind = Literal["AdapterPathRefused", "InvalidAdapter", "UnsupportedAdapter", "CoverageError"]
_KINDS: dict[Kind, type[AdapterError]] = {
    "AdapterPathRefused": AdapterPathRefused,
    "InvalidAdapter": InvalidAdapter,
    "UnsupportedAdapter": UnsupportedAdapter,
    "CoverageError": CoverageError,
}


class Refused(msgspec.Struct, frozen=True, tag=True):
    """`details` is a traceback for the log, where the refusal was not foreseen."""

    kind: Kind
    message: str
    details: str = ""


Answer = Verified | Refused


def verify(job: Job) -> Verified:
    """Read and check the adapter against the base. Slow (reads every byte). Raises AdapterError, and nothing else."""
    try:
        with _open(job) as folder:
            package = read_adapter(folder, job.base, job.room, job.ignore_keys)
            return Verified(package, os.path.relpath(folder.path, folder.root))
    except AdapterError:
        raise
    except OSError as error:  # its text would show the path
        raise InvalidAdapter(
            f"the adapter cannot be read: {error.strerror}; see that the server's user may read the files"
        ) from None
    except Exception as error:
        raise Unforeseen(error) from error


def _open(job: Job) -> Folder:
    if not job.roots:
        raise AdapterPathRefused(
            "this server was started without an adapter directory, so no path may be read: "
            "start it with --adapters or --adapter-root"
        )
    if "\0" in job.path:
        raise AdapterPathRefused("the path holds a NUL byte; send the directory's name as it is")
    return Folder(os.path.join(job.roots[0], job.path), job.roots)


def answer(job: Job) -> Answer:
    try:
        return verify(job)
    except Unforeseen as error:
        return Refused("InvalidAdapter", str(error), error.details)
    except AdapterError as error:
        kind = type(error).__name__
        return Refused(msgspec.convert(kind, Kind), str(error))


def refusal(refused: Refused) -> AdapterError:
    """The same refusal as an exception, in another process."""
    return _KINDS[refused.kind](refused.message)


def _limit(kind: int, value: int) -> None:
    """As far as whoever started the server has not set less."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _cpu_seconds_spent() -> int:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return math.ceil(spent.ru_utime + spent.ru_stime)


def _read_frame(stream: BinaryIO) -> bytes | None:
    prefix = stream.read(8)
    return stream.read(int.from_bytes(prefix, "little")) if len(prefix) == 8 else None


def main() -> None:
    _limit(resource.RLIMIT_AS, MAX_MEMORY_BYTES)
    jobs = msgspec.msgpack.Decoder(Job)
    jobs_in, answers_out = sys.stdin.buffer, sys.stdout.buffer
    answers_out.write(READY)
    answers_out.flush()
    while (frame := _read_frame(jobs_in)) is not None:
        job = jobs.decode(frame)
        _limit(resource.RLIMIT_CPU, _cpu_seconds_spent() + job.cpu_seconds)
        try:
            encoded = msgspec.msgpack.encode(answer(job))
        except UnicodeEncodeError:  # a link's target, say: halves of surrogate pairs have no bytes
            encoded = msgspec.msgpack.encode(
                Refused("InvalidAdapter", "a name in the adapter's path is not UTF-8; rename it")
            )
        answers_out.write(len(encoded).to_bytes(8, "little") + encoded)
        answers_out.flush()


if __name__ == "__main__":
    main()
