"""What commands can do with adapters, wherever these are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

Told = dict[str, Any]  # an object as /v1 has it


@dataclass(frozen=True)
class Wanted:
    """What a name shall mean: the adapter at `path`, which is absolute."""

    name: str
    path: Path
    manifest: Told | None
    ignore_keys: tuple[str, ...]
    replace: bool
    verify: bool


class Reached(Protocol):
    """What there is to do, wherever it is done. Raises AdapterError and Failed."""

    where: str

    def adapters(self) -> list[Told]: ...

    def aliases(self) -> list[Told]: ...

    def add(self, wanted: Wanted) -> Told: ...

    def remove(self, name: str, drain_s: float | None) -> Told: ...

    def collect(self) -> Told: ...

    def verify(self, model: str) -> Told:
        """`model`: name, or name@revision."""

    def close(self) -> None: ...
