"""What somebody wants a name to mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters_store.manifest import Manifest
from adapters_store.rules import Rules
from adapters_store.store.blobs import Desk
from adapters_store.verify import Job


@dataclass(frozen=True)
class Wish:
    """`job` makes the work of verification, given a desk to copy files to.

    `manifest` None: the one that lies with the files, or none. `verify`: compare with merged weights before it counts.
    `root`: where the files come from, for people, if it is not their directory.
    """

    name: str
    job: Callable[[Desk], Job]
    manifest: Manifest | None = None
    verify: bool = False
    is_durable: bool = True
    root: str | None = None


def source_path(rules: Rules, path: str, ignore_keys: Sequence[str] = ()) -> Callable[[Desk], Job]:
    """An adapter in a directory below the roots."""
    return lambda desk: rules.job(path, ignore_keys, desk)


def own_directory(rules: Rules, directory: Path, ignore_keys: Sequence[str] = ()) -> Callable[[Desk], Job]:
    """An adapter in a directory of ours: what was uploaded or fetched."""
    root = str(directory.resolve())
    return lambda desk: rules.job_below((root,), root, ignore_keys, desk)
