"""What adapters are held to: the base that they must fit, where they may lie, and the room that there is."""

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from adapters_store.base_spec import BaseSpec
from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from adapters_store.room import Room
from adapters_store.store.blobs import Desk
from adapters_store.verify import Job, verify


class Adapter(msgspec.Struct, frozen=True):
    """A verified adapter, whole and in this process. `root` is its directory's place below its adapter root."""

    ref: AdapterRef
    package: AdapterPackage
    root: str = ""


class Rules:
    """`roots` are the directories below which adapters may be read: a path arrives over HTTP, and must not be a way to
    read the rest of the machine. `room` is what an adapter may need at most."""

    def __init__(self, base: BaseSpec, roots: Sequence[Path] = (), room: Room | None = None) -> None:
        self.base, self.room = base, room
        self._roots = tuple(os.path.realpath(root) for root in roots)

    def job(self, path: str, ignore_keys: Sequence[str] = (), desk: Desk | None = None) -> Job:
        """What must be verified before a name may mean the adapter at `path`, passing over the unknown keys of its
        configuration that `ignore_keys` names."""
        return self.job_below(self._roots, path, ignore_keys, desk)

    def job_below(
        self, roots: tuple[str, ...], path: str, ignore_keys: Sequence[str] = (), desk: Desk | None = None
    ) -> Job:
        """The same below directories that are our own."""
        paths = desk.paths if desk is not None else None
        return Job(path, roots, self.base, self.room, tuple(ignore_keys), desk=paths)

    def read(self, name: str, path: str, ignore_keys: Sequence[str] = ()) -> Adapter:
        """Verify in this process, which it may hold up, and serve it from where it lies: for tools and tests; a server
        has a Verifier and a Store. Raises AdapterError."""
        checked = verify(self.job(path, ignore_keys))
        ref = AdapterRef(name, checked.package.revision, checked.package.kind)
        return Adapter(ref, checked.package, checked.root)
