"""The catalogue: which adapters exist, by name. Residency on a device is another matter (server/weights)."""

import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from adapters_store.base_spec import BaseSpec
from adapters_store.errors import AdapterConflict, AdapterNotFound, InvalidAdapterName, shown
from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from adapters_store.room import Room
from adapters_store.verify import Job, Verified, verify

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
    read the rest of the machine. `room` is what an adapter may need at most, `base_names` what the base is known as
    beside its own name.
    """

    def __init__(
        self,
        base_name: str,
        base: BaseSpec,
        roots: Sequence[Path] = (),
        room: Room | None = None,
        base_names: Sequence[str] = (),
    ) -> None:
        self.base_name = base_name
        self.base_names = (base_name, *base_names)
        self._base, self._room = base, room
        self._roots = tuple(os.path.realpath(root) for root in roots)
        self._entries: dict[str, CatalogEntry] = {}

    def job(self, name: str, path: str, ignore_keys: Sequence[str] = ()) -> Job:
        """What must be verified before this name may mean the adapter at `path`, passing over the unknown keys of its
        configuration that `ignore_keys` names. Raises AdapterError for the name."""
        self._check_name(name)
        return Job(path, self._roots, self._base, self._room, ignore_keys=tuple(ignore_keys))

    def read(self, name: str, path: str, ignore_keys: Sequence[str] = ()) -> CatalogEntry:
        """Verify in this process, which it may hold up: for tools and tests; a server has a Verifier. Adds nothing."""
        return entry_of(name, verify(self.job(name, path, ignore_keys)))

    def add(self, entry: CatalogEntry) -> bool:
        """Give the name to these weights. False if it already meant exactly these: then their files may have moved."""
        name = entry.ref.name
        self._check_name(name)
        known = self._entries.get(name.casefold())
        if known is None:
            self._entries[name.casefold()] = entry
            return True
        if known.ref != entry.ref:
            other = " with other weights" if known.ref.revision != entry.ref.revision else ""
            raise AdapterConflict(f"the name {name!r} is taken by {known.ref.name!r}{other}; delete that adapter first")
        self._entries[name.casefold()] = msgspec.structs.replace(entry, created=known.created)
        return False

    def get(self, name: str) -> CatalogEntry:
        if name not in self:
            raise AdapterNotFound(name)
        return self._entries[name.casefold()]

    def remove(self, name: str) -> CatalogEntry:
        """New requests no longer find it; requests that hold its reference are the engine's to finish."""
        if name == self.base_name:
            raise AdapterConflict(f"{name!r} is the base model and cannot be deleted")
        entry = self.get(name)
        del self._entries[name.casefold()]
        return entry

    def __iter__(self) -> Iterator[CatalogEntry]:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.ref.name))

    def __contains__(self, name: str) -> bool:
        entry = self._entries.get(name.casefold())
        return entry is not None and entry.ref.name == name

    def _check_name(self, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise InvalidAdapterName(
                f"{shown(name)!r} is not an adapter name: 1 to 128 of A-Z a-z 0-9 . _ - with a letter or digit first"
            )
        if name.casefold() == self.base_name.casefold():
            raise AdapterConflict(f"{name!r} is the name of the base model; take another")


def entry_of(name: str, verified: Verified) -> CatalogEntry:
    ref = AdapterRef(name, verified.package.revision, verified.package.kind)
    return CatalogEntry(ref, verified.package, verified.root, created=int(time.time()))
