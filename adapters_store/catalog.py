"""The catalogue: which adapters exist, by name. Residency on a device is another matter (server/weights)."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import (
    AdapterConflict,
    AdapterNotFound,
    AdapterPathRefused,
    InvalidAdapter,
    InvalidAdapterName,
)
from adapters_store.formats import read_adapter
from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef

# usable as a URL segment, in a metric label and in a comma-joined list
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class CatalogEntry(msgspec.Struct, frozen=True):
    """`root` is the directory's place below the adapter root, for people; `created` is in seconds of Unix time."""

    ref: AdapterRef
    package: AdapterPackage
    root: str
    created: int


class Catalog:
    """Adapters by name. A name is unique without regard to case, and never the base's own.

    `roots` are the directories below which adapters may be read: a path arrives over HTTP, and must not be a way to
    read the rest of the machine. Thread-safe: verification runs beside the event loop.
    """

    def __init__(self, base_name: str, base: BaseSpec, roots: tuple[Path, ...] = ()) -> None:
        self.base_name = base_name
        self._base = base
        self._roots = tuple(root.resolve() for root in roots)
        self._entries: dict[str, CatalogEntry] = {}
        self._lock = threading.Lock()

    def read(self, name: str, path: str) -> CatalogEntry:
        """Verify the adapter at `path` against the base. Slow (reads every byte); adds nothing."""
        self._check_name(name)
        try:
            directory = self._resolve(path)
            package = read_adapter(directory, self._base)
        except OSError as error:  # its text would show the path
            raise InvalidAdapter(f"the adapter cannot be read: {error.strerror}") from None
        root = next(root for root in self._roots if directory.is_relative_to(root))
        ref = AdapterRef(name, package.revision, package.kind)
        return CatalogEntry(ref, package, str(directory.relative_to(root)), created=int(time.time()))

    def add(self, entry: CatalogEntry) -> bool:
        """Give the name to these weights. False if it already meant exactly these: then their files may have moved."""
        name = entry.ref.name
        with self._lock:
            self._check_name(name)
            known = self._entries.get(name.casefold())
            if known is not None:
                if known.ref == entry.ref:
                    self._entries[name.casefold()] = msgspec.structs.replace(entry, created=known.created)
                    return False
                raise AdapterConflict(
                    f"the name {name!r} is taken by {known.ref.name!r} with other weights; delete that adapter first"
                )
            self._entries[name.casefold()] = entry
            return True

    def get(self, name: str) -> CatalogEntry:
        entry = self._entries.get(name.casefold())
        if entry is None or entry.ref.name != name:
            raise AdapterNotFound(name)
        return entry

    def remove(self, name: str) -> CatalogEntry:
        """New requests no longer find it; requests that hold its reference are the engine's to finish."""
        if name == self.base_name:
            raise AdapterConflict(f"{name!r} is the base model and cannot be deleted")
        with self._lock:
            return self._entries.pop(self.get(name).ref.name.casefold())

    def __iter__(self) -> Iterator[CatalogEntry]:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.ref.name))

    def __len__(self) -> int:
        return len(self._entries)

    def _check_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise InvalidAdapterName(
                f"{name[:128]!r} is not an adapter name: 1 to 128 of A-Z a-z 0-9 . _ - with a letter or digit first"
            )
        if name.casefold() == self.base_name.casefold():
            raise AdapterConflict(f"{name!r} is the name of the base model")

    def _resolve(self, path: str) -> Path:
        """A relative path is taken below the first root. Links are followed (a hub cache is made of them), and then
        the directory and every file in it must lie in a root."""
        if not self._roots:
            raise AdapterPathRefused("this server was started without an adapter directory, so no path may be read")
        if "\0" in path:
            raise AdapterPathRefused("the path holds a NUL byte")
        directory = (self._roots[0] / path).resolve()
        files = directory.iterdir() if self._allowed(directory) and directory.is_dir() else ()
        if not self._allowed(directory) or not all(self._allowed(file.resolve()) for file in files):
            raise AdapterPathRefused(f"{path[:200]!r} lies outside the adapter directories that this server may read")
        return directory

    def _allowed(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)
