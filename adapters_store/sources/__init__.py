"""Places elsewhere that adapters are fetched from: plug-ins, and off unless the operator allows some of what they have.

A plug-in is an entry point of the group `heddle.adapter_sources`: its name is what stands before the colon of a
reference (`hub:org/name@revision`), its value a class without arguments that is a `Source`. It is imported and run in a
process of its own (fetch.py), after the reference was found on the allow-list (allowed.py).
"""

from pathlib import Path
from typing import Protocol

import msgspec

GROUP = "heddle.adapter_sources"


class FetchLimits(msgspec.Struct, frozen=True):
    """Bytes and files of one adapter."""

    max_bytes: int = 16 << 30
    max_files: int = 64


class Fetched(msgspec.Struct, frozen=True, tag=True):
    """`resolved` says for the log exactly what was fetched, with a revision that cannot come to mean something else."""

    resolved: str


class Source(Protocol):
    def fetch(self, reference: str, into: Path, limits: FetchLimits) -> Fetched:
        """Write the adapter's files into an empty directory. `reference` is what stands behind the colon.

        Asks for sizes before bytes, takes what `is_adapter_file` says and nothing else, and takes credentials from the
        environment only. Raises AdapterError without addresses in it; whatever else it raises is reported as its
        failure.
        """
        ...
