"""Verification, and the process that does it for the server: `python -m adapters_store.verify`.

A directory is read that somebody else filled: a parser may take minutes over it, a regular expression may never end,
a file may be endless. So the server has this done by a process that it can kill (verifier.py, worker.py). The process
limits its own memory, and, lest it outlive its parent, its time on the processor.
"""

import math
import os
import resource
from typing import Literal

import msgspec

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import (
    AdapterError,
    AdapterPathRefused,
    CoverageError,
    InvalidAdapter,
    InvalidManifest,
    NoAdapterThere,
    StoreFailed,
    StoreFull,
    Unforeseen,
    UnsupportedAdapter,
)
from adapters_store.files import Folder, StoredFolder
from adapters_store.formats import read_adapter
from adapters_store.json_file import read_json
from adapters_store.manifest import FILE as MANIFEST
from adapters_store.manifest import Manifest, parse_manifest
from adapters_store.parts import AdapterPackage, SourceFile, describe
from adapters_store.records import Content, Weights, weights_of
from adapters_store.room import Room
from adapters_store.store.blobs import Desk
from adapters_store.worker_process import limit, serve

MAX_MEMORY_BYTES = 512 << 20  # of addresses: Python and numpy take 110 MB, an adapter a few tens
MAX_MANIFEST_BYTES = 128 << 10


class Job(msgspec.Struct, frozen=True):
    """`roots` are absolute and free of links; a relative path is taken below the first. `ignore_keys` are unknown keys
    of the configuration to pass over. `cpu_seconds` are what the process may spend on it at most. `desk`: where the
    files are copied to (store/blobs.py); None: nowhere, they are served from where they lie. `stored`: they are in the
    store already, which is the root."""

    path: str
    roots: tuple[str, ...]
    base: BaseSpec
    room: Room | None = None
    ignore_keys: tuple[str, ...] = ()
    cpu_seconds: int = 60
    desk: tuple[str, str] | None = None
    stored: tuple[SourceFile, ...] = ()


class Checked(msgspec.Struct, frozen=True):
    """`root` is the directory's place below its adapter root, for people; `manifest` the one that lies in it. `files`
    are all that were read, where they are kept."""

    package: AdapterPackage
    root: str
    manifest: Manifest | None
    files: tuple[SourceFile, ...]


class Verified(msgspec.Struct, frozen=True, tag=True):
    """The same for another process, which need not understand all of it."""

    weights: Weights
    content: Content
    root: str
    declared_base: str | None
    notes: tuple[str, ...]
    manifest: Manifest | None


Kind = Literal[
    "AdapterPathRefused",
    "InvalidAdapter",
    "InvalidManifest",
    "NoAdapterThere",
    "UnsupportedAdapter",
    "CoverageError",
    "StoreFull",
    "StoreFailed",
]
_KINDS: dict[Kind, type[AdapterError]] = {
    "AdapterPathRefused": AdapterPathRefused,
    "InvalidAdapter": InvalidAdapter,
    "InvalidManifest": InvalidManifest,
    "NoAdapterThere": NoAdapterThere,
    "UnsupportedAdapter": UnsupportedAdapter,
    "CoverageError": CoverageError,
    "StoreFull": StoreFull,
    "StoreFailed": StoreFailed,
}


class Refused(msgspec.Struct, frozen=True, tag=True):
    """`details` is a traceback for the log, where the refusal was not foreseen."""

    kind: Kind
    message: str
    details: str = ""


Answer = Verified | Refused


def verify(job: Job) -> Checked:
    """Read and check the adapter against the base. Slow (reads every byte). Raises AdapterError, and nothing else."""
    try:
        with _open(job) as folder:
            desk = Desk(*job.desk) if job.desk is not None else None
            manifest = _manifest(folder)
            package, files = read_adapter(folder, job.base, job.room, job.ignore_keys, desk)
            return Checked(package, os.path.relpath(folder.path, folder.root), manifest, files)
    except AdapterError:
        raise
    except OSError as error:  # its text would show the path
        raise InvalidAdapter(
            f"the adapter cannot be read: {error.strerror}; see that the server's user may read the files"
        ) from None
    except Exception as error:
        raise Unforeseen(error) from error


def _open(job: Job) -> Folder:
    if job.stored:
        return StoredFolder(job.path, job.roots[0], job.stored)
    if not job.roots:
        raise AdapterPathRefused(
            "this server was started without an adapter directory, so no path may be read: "
            "start it with --adapters or --adapter-root"
        )
    if "\0" in job.path:
        raise AdapterPathRefused("the path holds a NUL byte; send the directory's name as it is")
    return Folder(os.path.join(job.roots[0], job.path), job.roots)


def _manifest(folder: Folder) -> Manifest | None:
    if MANIFEST not in folder.names:
        return None
    return parse_manifest(read_json(folder, MANIFEST, MAX_MANIFEST_BYTES), MANIFEST)


def answer(job: Job) -> Answer:
    try:
        checked = verify(job)
    except Unforeseen as error:
        return Refused("InvalidAdapter", str(error), error.details)
    except AdapterError as error:
        kind = type(error).__name__
        return Refused(msgspec.convert(kind, Kind), str(error))
    package = checked.package
    weights = msgspec.structs.replace(weights_of(package), ignored=job.ignore_keys)
    described = msgspec.json.encode(describe(package))
    content = Content(msgspec.msgpack.encode(package), described, checked.files)
    return Verified(weights, content, checked.root, package.declared_base, package.notes, checked.manifest)


def refusal(refused: Refused) -> AdapterError:
    """The same refusal as an exception, in another process."""
    return _KINDS[refused.kind](refused.message)


def _cpu_seconds_spent() -> int:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return math.ceil(spent.ru_utime + spent.ru_stime)


def _answer_to(frame: bytes) -> bytes:
    job = msgspec.msgpack.decode(frame, type=Job)
    limit(resource.RLIMIT_CPU, _cpu_seconds_spent() + job.cpu_seconds)
    try:
        return msgspec.msgpack.encode(answer(job))
    except UnicodeEncodeError:  # a link's target, say: halves of surrogate pairs have no bytes
        return msgspec.msgpack.encode(Refused("InvalidAdapter", "a name in the adapter's path is not UTF-8; rename it"))


def main() -> None:
    limit(resource.RLIMIT_AS, MAX_MEMORY_BYTES)
    serve(_answer_to)


if __name__ == "__main__":
    main()
