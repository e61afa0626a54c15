"""Uploads as they lie on disk: a directory each, files in it, and nothing beside. A server that starts finds them as
the last one left them: how far a file has come is its size.

Directories and files are opened below one another's descriptors, and never through a link.
"""

import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from adapters_store.errors import FileNameRefused, StoreFull, UploadConflict, UploadNotFound, UploadTooLarge
from adapters_store.file_names import check_file_name

_ID = re.compile(r"[A-Za-z0-9_-]{32}")
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class UploadLimits(msgspec.Struct, frozen=True):
    """`max_upload_bytes` and `max_files` are of one upload, `max_uploads` may be under way, `max_writers` requests may
    send bytes at once. An upload that nobody has written to for `idle_s` seconds may be swept away, and after
    `give_place_s` already if as many are under way as may."""

    max_upload_bytes: int = 16 << 30
    max_files: int = 64
    max_uploads: int = 64
    max_writers: int = 32
    idle_s: float = 24 * 3600.0
    give_place_s: float = 900.0


class Upload(msgspec.Struct, frozen=True):
    """`files` are sizes in bytes by name; `changed` is Unix time."""

    id: str
    files: dict[str, int]
    changed: float

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())


class TooManyUploads(Exception):
    """As many uploads are under way, or as many requests send bytes, as may."""


class UploadFiles:
    """Every call may wait for the disk. Raises AdapterError and TooManyUploads."""

    def __init__(self, directory: Path, limits: UploadLimits) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.directory, self._limits = directory.resolve(), limits

    def create(self) -> Upload:
        if self.sweep() == 0 and len(os.listdir(self.directory)) >= self._limits.max_uploads:
            self._give_place()
        with self._opened() as at, disk_may_be_full():
            if len(os.listdir(at)) >= self._limits.max_uploads:
                raise TooManyUploads(
                    f"{self._limits.max_uploads} uploads are under way, which is as many as may; finish or delete one"
                )
            upload_id = secrets.token_urlsafe(24)
            os.mkdir(upload_id, 0o700, dir_fd=at)
        return self.read(upload_id)

    def read(self, upload_id: str) -> Upload:
        with self._opened_upload(upload_id) as at:
            return _read(upload_id, at)

    def delete(self, upload_id: str) -> None:
        with self._opened_upload(upload_id), self._opened() as at:
            shutil.rmtree(upload_id, dir_fd=at)

    def sweep(self) -> int:
        """Delete the uploads that have been idle for too long; returns how many."""
        oldest, count = time.time() - self._limits.idle_s, 0
        for upload_id in filter(_ID.fullmatch, os.listdir(self.directory)):
            try:
                if self.read(upload_id).changed < oldest:
                    self.delete(upload_id)
                    count += 1
            except UploadNotFound:
                pass  # another thread was quicker
        return count

    def _give_place(self) -> None:
        """Delete the upload that has been idle longest, if that is long: their ids are secret, so nobody else could
        delete what its sender has given up."""
        with suppress(UploadNotFound):
            uploads = [self.read(it) for it in os.listdir(self.directory) if _ID.fullmatch(it)]
            oldest = min(uploads, key=lambda upload: upload.changed, default=None)
            if oldest is not None and oldest.changed < time.time() - self._limits.give_place_s:
                self.delete(oldest.id)

    def open(self, upload_id: str, name: str, offset: int | None) -> "UploadFile":
        """A file to write to from `offset`, which must be its end; from its start if None, and then it is emptied."""
        check_file_name(name)
        with self._opened_upload(upload_id) as at:
            files = _read(upload_id, at).files
            if offset is not None and files.get(name, 0) != offset:
                size = files.get(name, 0)
                raise UploadConflict(f"{name} has {size:,} bytes here; continue at {size:,}, not at {offset:,}", size)
            if name not in files and len(files) >= self._limits.max_files:
                raise UploadTooLarge(f"the upload has {len(files)} files, which is as many as may be")
            try:
                with disk_may_be_full():
                    descriptor = os.open(name, _FILE | os.O_CREAT, 0o600, dir_fd=at)
            except OSError as error:
                raise FileNameRefused(f"{name} is there and cannot be written: {error.strerror}") from None
            file = UploadFile(name, os.dup(at), descriptor, self._limits)
        if offset is None:
            os.ftruncate(descriptor, 0)
        file.offset = offset or 0
        return file

    @contextmanager
    def _opened(self) -> Iterator[int]:
        descriptor = os.open(self.directory, _DIRECTORY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _opened_upload(self, upload_id: str) -> Iterator[int]:
        if not _ID.fullmatch(upload_id):
            raise UploadNotFound
        with self._opened() as at:
            try:
                descriptor = os.open(upload_id, _DIRECTORY, dir_fd=at)
            except (FileNotFoundError, NotADirectoryError):
                raise UploadNotFound from None
            try:
                yield descriptor
            finally:
                os.close(descriptor)


class UploadFile:
    """One file of an upload, open to be written from `offset` on."""

    def __init__(self, name: str, directory: int, descriptor: int, limits: UploadLimits) -> None:
        self.name, self.offset = name, 0
        self._directory, self._descriptor, self._limits = directory, descriptor, limits

    def write(self, data: bytes | bytearray) -> None:
        """All of it, or as much as the disk has room for. Raises StoreFull, UploadTooLarge, UploadNotFound."""
        if os.fstat(self._directory).st_nlink == 0:
            raise UploadNotFound  # deleted meanwhile
        total, limit = _read("", self._directory).num_bytes + len(data), self._limits.max_upload_bytes
        if total > limit:
            raise UploadTooLarge(f"the upload would have {total:,} bytes or more; at most {limit:,} are taken")
        rest = memoryview(data)
        with disk_may_be_full():
            while rest:
                count = os.pwrite(self._descriptor, rest, self.offset)
                rest, self.offset = rest[count:], self.offset + count

    def close(self) -> None:
        os.close(self._descriptor)
        os.close(self._directory)


@contextmanager
def disk_may_be_full() -> Iterator[None]:
    """Raises StoreFull for a disk or a quota without room."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StoreFull("the server's disk for adapters is full; what had room is kept, try again later") from None
        raise


def _read(upload_id: str, directory: int) -> Upload:
    files, changed = {}, os.fstat(directory).st_mtime
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # it is being deleted
            if stat.S_ISREG(status.st_mode):
                files[entry.name], changed = status.st_size, max(changed, status.st_mtime)
    return Upload(upload_id, dict(sorted(files.items())), changed)
