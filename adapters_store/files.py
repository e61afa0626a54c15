"""Files that strangers may change at any moment: opened once without following links, then only descriptors are read.

Hub caches are made of links (`snapshot/adapter_model.safetensors -> ../../blobs/…`), so a path is resolved first, and
must then lie below a root. What it resolved to is opened from the top, one component after another, and none may be a
link: if one has become a link since, the open fails, and no name is looked at twice. Size, kind and every byte are
read from the descriptor. The engine opens what was verified by the same routine.
"""

import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import PurePath

from adapters_store.errors import AdapterPathRefused, InvalidAdapter, NoAdapterThere, shown
from adapters_store.parts import SourceFile

MAX_ENTRIES = 10_000  # of a directory
_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # opening a FIFO would otherwise wait for a writer


def open_resolved(path: str, flags: int = _FILE) -> int:
    """A descriptor of an absolute path, no component of which may be a link. Raises OSError."""
    *steps, last = PurePath(path).parts[1:] or (".",)
    at = os.open("/", _STEP)
    try:
        for step in steps:
            below = os.open(step, _STEP, dir_fd=at)
            os.close(at)
            at = below
        return os.open(last, flags, dir_fd=at)
    finally:
        os.close(at)


def read_exactly(descriptor: int, offset: int, into: memoryview) -> None:
    """Fill `into` from a file. Raises EOFError where it ends too soon."""
    while into:
        count = os.preadv(descriptor, [into], offset)
        if count == 0:
            raise EOFError("it ends before its data")
        into, offset = into[count:], offset + count


class OpenFile:
    """A regular file of an adapter. `path` is where it was found, links resolved; its size is bytes. `parsed` is all of
    a small one, as it was read: what was understood is what is kept."""

    def __init__(self, descriptor: int, name: str, path: str) -> None:
        self.descriptor, self.name, self.path = descriptor, name, path
        self.parsed: bytes | None = None
        status = os.fstat(descriptor)
        self.size, self.is_regular = status.st_size, stat.S_ISREG(status.st_mode)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes. Raises InvalidAdapter where the file has become shorter."""
        raw = bytearray(size)
        self.read_into(offset, memoryview(raw))
        return bytes(raw)

    def read_into(self, offset: int, into: memoryview) -> None:
        try:
            read_exactly(self.descriptor, offset, into)
        except EOFError:
            raise InvalidAdapter(f"{shown(self.name)} was cut short while it was read; try again") from None


class Folder:
    """An adapter's directory, held open with the files that were opened in it; a context manager.

    `path` is the directory with links resolved, `root` the one of `roots` that it lies in. `names` are those of what is
    not a directory. Raises AdapterPathRefused for what lies outside the roots, NoAdapterThere for what is no directory,
    and OSError.
    """

    def __init__(self, path: str, roots: Sequence[str]) -> None:
        self._roots = roots
        self.path = self._resolve(path)
        self.name = os.path.basename(self.path)
        self.root = next(root for root in roots if _is_below(self.path, root))
        self._files: dict[str, OpenFile] = {}
        self._links: set[str] = set()
        with ExitStack() as closing:
            try:
                self._descriptor = open_resolved(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except (FileNotFoundError, NotADirectoryError):
                raise NoAdapterThere(f"{shown(self.name)!r} is not a directory; send that of the adapter") from None
            closing.callback(os.close, self._descriptor)
            self.names, self.directories = self._list()
            self._closing = closing.pop_all()

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def open(self, name: str) -> OpenFile:
        """One of `names`, opened the first time and the same descriptor ever after."""
        if name not in self._files:
            self._files[name] = self._open(name)
        return self._files[name]

    @property
    def opened(self) -> list[OpenFile]:
        """What an adapter was read from."""
        return list(self._files.values())

    def _open(self, name: str) -> OpenFile:
        if name not in self.names:
            raise InvalidAdapter(f"{shown(name)} is missing: copy it there")
        path = f"{self.path}/{name}"
        if name in self._links:
            path = self._resolve(path)
        try:
            descriptor = open_resolved(path) if name in self._links else os.open(name, _FILE, dir_fd=self._descriptor)
        except OSError as error:
            raise InvalidAdapter(
                f"{shown(name)} cannot be read: {error.strerror}; see that the server's user may read it"
            ) from None
        self._closing.callback(os.close, descriptor)
        file = OpenFile(descriptor, name, path)
        if not file.is_regular:
            raise InvalidAdapter(f"{shown(name)} is not a regular file; copy the file itself there")
        return file

    def _list(self) -> tuple[list[str], list[str]]:
        """Names of what is not a directory, and of the directories; notes which are links."""
        names: list[str] = []
        directories: list[str] = []
        with os.scandir(self._descriptor) as entries:
            for entry in entries:
                if len(names) + len(directories) >= MAX_ENTRIES:
                    raise InvalidAdapter(
                        f"{shown(self.name)!r} has more than {MAX_ENTRIES:,} entries: give the adapter a directory of "
                        "its own"
                    )
                (directories if entry.is_dir(follow_symlinks=False) else names).append(entry.name)
                if entry.is_symlink():
                    self._links.add(entry.name)
        return sorted(names), sorted(directories)

    def _resolve(self, path: str) -> str:
        resolved = os.path.realpath(path)
        if not any(_is_below(resolved, root) for root in self._roots):
            raise AdapterPathRefused(
                f"{shown(os.path.basename(path))!r} lies outside the adapter directories that this server may read; "
                "move it there, or start the server with --adapter-root"
            )
        return resolved


class StoredFolder(Folder):
    """An adapter that lies in a store: its files by the names that they had, each somewhere below `root`."""

    def __init__(self, name: str, root: str, files: Sequence[SourceFile]) -> None:
        self.path, self.root, self.name = root, root, name
        self._places = {file.file: os.path.join(root, file.path) for file in files}
        self.names, self.directories = sorted(self._places), []
        self._files = {}
        self._closing = ExitStack()

    def _open(self, name: str) -> OpenFile:
        if name not in self._places:
            raise InvalidAdapter(f"{shown(name)} is missing in the store; register the adapter again")
        try:
            descriptor = open_resolved(self._places[name])
        except OSError as error:
            raise InvalidAdapter(f"{shown(name)} cannot be read from the store: {error.strerror}") from None
        self._closing.callback(os.close, descriptor)
        return OpenFile(descriptor, name, self._places[name])


def _is_below(path: str, root: str) -> bool:
    return PurePath(path).is_relative_to(root)
