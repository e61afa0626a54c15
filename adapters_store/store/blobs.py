"""Files by the hash of what they hold. What is served is one of these, which nobody changes; never the file that it was
copied from.

A file becomes a blob in this order: copied to a temporary name, synced, hashed, renamed, the directory synced. Only
then may the database speak of it. So a blob that is there is whole, and one that nobody speaks of can be swept away.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters_store.errors import InvalidAdapter, StoreFailed, StoreFull, shown
from adapters_store.files import OpenFile, open_resolved
from adapters_store.parts import SourceFile
from adapters_store.store.journal import blob_path

_FICLONE = 0x40049409  # ioctl of Linux: the same blocks under another inode, copied when either changes
_CHUNK_BYTES = 4 << 20
_SHELF, _BLOB = re.compile(r"[0-9a-f]{2}"), re.compile(r"[0-9a-f]{64}")
_MADE = ".made"  # how the name of an empty file ends, beside the copies
# of an open: the file may be as it was stored, all the same
_MAY_PASS = (errno.EACCES, errno.EAGAIN, errno.EINTR, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Blobs:
    """Below `directory`: `blobs/ab/abcd…`, and `incoming/` for what is being copied, in a directory for each job."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "blobs"
        self._incoming = directory / "incoming"

    def prepare(self) -> None:
        """Make the directories; sweep what was being copied when a server ended. Raises OSError."""
        self.root.mkdir(exist_ok=True)
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(exist_ok=True)

    @contextmanager
    def desk(self) -> Iterator["Desk"]:
        """A place to copy to, which is gone at the end however that comes."""
        directory = self._incoming / secrets.token_hex(8)
        try:
            directory.mkdir()
        except OSError as error:
            raise store_error(error) from None
        try:
            yield Desk(str(self.root), str(directory))
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def remove(self, files: Iterable[SourceFile]) -> int:
        """Returns the bytes that this has freed. One that cannot be removed is left to the next sweep."""
        freed = 0
        for file in files:
            with suppress(OSError):
                os.unlink(self.root / blob_path(file.sha256))
                freed += file.size
        return freed

    def present(self) -> Iterator[SourceFile]:
        """Every blob that lies there, spoken of or not; whatever else somebody put there is passed over."""
        for shelf in sorted(os.listdir(self.root)):
            if not _SHELF.fullmatch(shelf) or not (self.root / shelf).is_dir():
                continue
            for entry in os.scandir(self.root / shelf):
                if _BLOB.fullmatch(entry.name) and entry.name.startswith(shelf):
                    size = entry.stat(follow_symlinks=False).st_size
                    yield SourceFile("", blob_path(entry.name), size, entry.name)

    def named(self, sha256: str) -> SourceFile:
        """A blob as it lies there, of 0 bytes if it does not."""
        try:
            size = os.stat(self.root / blob_path(sha256), follow_symlinks=False).st_size
        except OSError:
            size = 0
        return SourceFile("", blob_path(sha256), size, sha256)

    def fault(self, file: SourceFile, read: bool = False) -> str | None:
        """What is wrong with a blob, if anything: missing or of another size; with `read`, of other bytes. Raises
        StoreFailed where that cannot be told now."""
        try:
            descriptor = open_resolved(str(self.root.resolve() / file.path))
        except OSError as error:
            if error.errno in _MAY_PASS:
                raise StoreFailed(f"the store cannot be read now: {error.strerror}") from None
            return f"{shown(file.file)} cannot be read from the store: {error.strerror}"
        try:
            found = OpenFile(descriptor, file.file, file.path)
            if found.size != file.size:
                return f"{shown(file.file)} has {found.size:,} bytes in the store; {file.size:,} were stored"
            if read and _hash(found) != file.sha256:
                return f"{shown(file.file)} holds other bytes in the store than were stored"
            return None
        except InvalidAdapter as error:
            return str(error)
        finally:
            os.close(descriptor)


class Desk:
    """Where one job copies files to, and the shelf that they go to. Paths, since the job may be another process's."""

    def __init__(self, blobs: str, directory: str) -> None:
        self._blobs, self._directory = blobs, directory

    @property
    def paths(self) -> tuple[str, str]:
        return self._blobs, self._directory

    def made(self) -> list[str]:
        """Hashes of the blobs that this job brought, or was about to. Nothing speaks of them yet."""
        try:
            return [name.removesuffix(_MADE) for name in os.listdir(self._directory) if name.endswith(_MADE)]
        except OSError:
            return []

    def keep(self, file: OpenFile, sha256: str, raw: bytes | None = None) -> SourceFile:
        """Store the file under the hash of what was verified; `raw` is all of it where it is in memory already.

        Raises InvalidAdapter where the file holds something else by now, StoreFull, StoreFailed.
        """
        kept = SourceFile(file.name, blob_path(sha256), file.size if raw is None else len(raw), sha256)
        final = f"{self._blobs}/{kept.path}"
        try:
            if not _is_whole(final, kept):
                self._copy(file, kept, final, raw)
        except OSError as error:
            raise store_error(error) from None
        return kept

    def _copy(self, file: OpenFile, kept: SourceFile, final: str, raw: bytes | None) -> None:
        Path(self._directory, f"{kept.sha256}{_MADE}").touch()
        temporary = f"{self._directory}/{kept.sha256}"
        descriptor = os.open(temporary, _NEW, 0o400)
        try:
            copied = _write(descriptor, raw) if raw is not None else _clone_or_copy(file, descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if copied != kept.sha256:
            raise InvalidAdapter(f"{shown(file.name)} changed while it was read; register the adapter again")
        shelf = os.path.dirname(final)
        if not os.path.isdir(shelf):
            with suppress(FileExistsError):
                os.mkdir(shelf)
            sync_directory(self._blobs)
        os.rename(temporary, final)
        sync_directory(shelf)


def store_error(error: OSError) -> StoreFull | StoreFailed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreFull("there is no room on the store's disk for this adapter; make room there and try again")
    return StoreFailed(f"the store cannot be written: {error.strerror}; see to its disk and try again")


def _is_whole(path: str, kept: SourceFile) -> bool:
    """Whether the blob is there. It is read, since a corrupt one can be mended now and not later."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        found = OpenFile(descriptor, kept.file, path)
        return found.size == kept.size and _hash(found) == kept.sha256
    finally:
        os.close(descriptor)


def _clone_or_copy(file: OpenFile, descriptor: int) -> str:
    """Returns the hash of what was copied: of the copy, where the file system makes one at once."""
    try:
        fcntl.ioctl(descriptor, _FICLONE, file.descriptor)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM):
            raise
    else:
        return _hash(OpenFile(descriptor, file.name, ""))
    digest = hashlib.sha256()
    for chunk in _chunks(file):
        digest.update(chunk)
        _write_all(descriptor, chunk)
    return digest.hexdigest()


def _hash(file: OpenFile) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(file):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(file: OpenFile) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_CHUNK_BYTES, max(1, file.size))))
    for offset in range(0, file.size, _CHUNK_BYTES):
        chunk = buffer[: min(_CHUNK_BYTES, file.size - offset)]
        file.read_into(offset, chunk)
        yield chunk


def _write(descriptor: int, raw: bytes) -> str:
    _write_all(descriptor, memoryview(raw))
    return hashlib.sha256(raw).hexdigest()


def _write_all(descriptor: int, chunk: memoryview) -> None:
    while chunk:
        chunk = chunk[os.write(descriptor, chunk) :]


def sync_directory(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
