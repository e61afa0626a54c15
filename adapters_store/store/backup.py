"""A copy of a store, made while its server runs: the catalogue as of one moment, and every blob that it speaks of.

The catalogue comes last. So a copy that was not finished is no store, and nobody restores half of one.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from adapters_store.errors import InvalidAdapter, StoreFailed
from adapters_store.files import OpenFile, open_resolved
from adapters_store.parts import SourceFile
from adapters_store.records import Record
from adapters_store.store.blobs import Blobs, Desk, store_error, sync_directory
from adapters_store.store.journal import Journal, blob_path
from adapters_store.store.store import DATABASE, check_is_store

_ATTEMPTS = 3  # the server may have removed a blob since the catalogue was copied; not each time


class BackedUp(NamedTuple):
    """`num_linked` of the blobs share the bytes of the store's; the others were copied."""

    num_names: int
    num_blobs: int
    num_bytes: int
    num_linked: int


class _BlobMissing(Exception):
    pass


def open_to_read(store: Path) -> Journal:
    """The catalogue and the log, whoever writes them. Raises StoreFailed."""
    check_is_store(store)
    return Journal(store / DATABASE, read_only=True)


def back_up(store: Path, target: Path) -> BackedUp:
    """Into a directory that is empty or not there yet. Raises StoreFailed and StoreFull; then nothing is left there."""
    with closing(open_to_read(store)) as journal:
        is_made = _make(store, target)
        try:
            return _copy(journal, Blobs(store), target)
        except OSError as error:
            _clear(target, is_made)
            raise store_error(error) from None
        except BaseException:
            _clear(target, is_made)
            raise


def _make(store: Path, target: Path) -> bool:
    """Whether the directory is new."""
    if target.resolve().is_relative_to(store.resolve()):
        raise StoreFailed("the backup would lie in the store itself; name a directory outside of it")
    try:
        if target.is_dir():
            if any(target.iterdir()):
                raise StoreFailed(f"{str(target)!r} is not empty; name a new directory for the backup")
            return False
        target.mkdir(mode=0o700, parents=True)
        return True
    except OSError as error:
        raise StoreFailed(f"{str(target)!r} cannot be written: {error.strerror}; name another directory") from None


def _copy(journal: Journal, source: Blobs, target: Path) -> BackedUp:
    blobs, part = Blobs(target), target / f"{DATABASE}.part"
    blobs.prepare()
    linked: set[str] = set()
    for attempt in range(1, _ATTEMPTS + 1):
        part.unlink(missing_ok=True)
        journal.backup(part)
        with closing(Journal(part, read_only=True)) as copy:
            records, sizes = copy.load().records, copy.blobs()
            wanted = [SourceFile(sha256[:12], blob_path(sha256), size, sha256) for sha256, size in sizes.items()]
            try:
                with blobs.desk() as desk:
                    linked |= {blob.sha256 for blob in wanted if _keep(blob, source, blobs, desk)}
            except _BlobMissing as missing:
                if attempt == _ATTEMPTS:
                    raise StoreFailed(_loss(copy, records, str(missing))) from None
                continue
        break
    blobs.remove([blob for blob in blobs.present() if blob.sha256 not in sizes])
    _settle(target, part)
    return BackedUp(len(records), len(sizes), sum(sizes.values()), len(linked & sizes.keys()))


def _keep(blob: SourceFile, source: Blobs, blobs: Blobs, desk: Desk) -> bool:
    """Whether it was linked. What cannot be is copied, and hashed on the way."""
    original, final = source.root / blob.path, blobs.root / blob.path
    if final.exists():  # since the attempt before
        return False
    fault = source.fault(blob)
    if fault is not None and not original.exists():
        raise _BlobMissing(blob.sha256)
    if fault is None:
        final.parent.mkdir(exist_ok=True)
        with suppress(OSError):  # another file system, or one without links
            os.link(original, final, follow_symlinks=False)
            return True
        fault = _copied(blob, original, desk)
    if fault is not None:
        raise StoreFailed(f"the blob {fault}; `heddle adapters verify` says whose it is, so there is no backup")
    return False


def _copied(blob: SourceFile, original: Path, desk: Desk) -> str | None:
    """What is wrong with it, if anything. A copy is on the disk when this returns."""
    descriptor = open_resolved(str(original.resolve()))
    try:
        desk.keep(OpenFile(descriptor, blob.file, blob.path), blob.sha256)
        return None
    except InvalidAdapter:
        return f"{blob.file} holds other bytes in the store than were stored"
    finally:
        os.close(descriptor)


def _settle(target: Path, part: Path) -> None:
    """Names of blobs, then the catalogue, are on the disk when this returns."""
    for shelf in (target / "blobs").iterdir():
        sync_directory(str(shelf))
    sync_directory(str(target / "blobs"))
    with part.open("rb") as database:
        os.fsync(database.fileno())
    part.rename(target / DATABASE)
    sync_directory(str(target))


def _loss(copy: Journal, records: Sequence[Record], sha256: str) -> str:
    names = [
        record.name
        for record in records
        if any(it.sha256 == sha256 for version in record.versions for it in copy.files(version.revision))
    ]
    return (
        f"the store has lost the blob {sha256[:12]} of {', '.join(names[:6]) or 'weights that no name means'}, so "
        "there is no backup; register that adapter again, or delete it and collect"
    )


def _clear(target: Path, is_made: bool) -> None:
    for entry in target.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if is_made:
        target.rmdir()
