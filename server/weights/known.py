"""Adapters that residency knows, and the tiers that they move through."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters_store.parts import PartKind, SourceFile
from adapters_store.ref import AdapterRef
from server.engine.request import Slot, Tier
from server.weights.transfer import Fetch, Transfer

A, L, H, R, Q = Tier.ABSENT, Tier.LOADING, Tier.HOST, Tier.RESIDENT, Tier.QUARANTINED
# every move that there is; anything else is our own bug
MOVES: dict[tuple[Tier, Tier], str] = {
    (A, L): "somebody wants it, or will soon",
    (L, R): "its bytes are on the device, and kernels are shown them",
    (L, H): "it was brought to the host cache only, or has left the device's room before it was used",
    (L, A): "its load has failed and may be tried again, or nobody wants it any more",
    (L, Q): "what was read, or came of it, is not what was verified",
    (H, L): "it is copied to the device",
    (H, A): "its copy gave way to others",
    (H, Q): "it can never be placed, or its outputs were found wanting",
    (R, H): "it made room on the device, and its copy is there",
    (R, A): "it made room on the device",
    (R, Q): "its outputs were found wanting",
    (A, Q): "it can never be placed, or its outputs were found wanting",
    (Q, A): "it was registered again",
}


@dataclass
class Known:
    """One adapter. `slot` 0: none, and no pages; else it has room on the device, be it filled or not."""

    ref: AdapterRef
    files: tuple[SourceFile, ...] = ()
    parts: dict[PartKind, list[Any]] = field(default_factory=dict)
    layouts: Sequence[Any] | None = None  # of its parts in each table; None: not asked yet
    tier: Tier = Tier.ABSENT
    slot: Slot = 0
    pages: int = 0
    pins: int = 0
    pinned: bool = False  # stays when nobody uses it, unlike one that only has pins
    job: Transfer | Fetch | None = None
    failure: str = ""  # of its last load, until somebody is told of it
    fault: str = ""  # why it is in quarantine, or will be when its job is over
    is_stale: bool = False  # it was registered again since its job was started
    forgotten: bool = False  # nobody wants it, but its job must end before its room is reused
    unused_since: float = 0.0  # when the last pin was released
    comes_from_host: bool = False  # what the load under way reads is in the host cache already
    load_s: dict[bool, float] = field(default_factory=dict)  # how long loads took: from the host cache, or not

    @property
    def is_idle(self) -> bool:
        """It may make room for others."""
        return self.tier is Tier.RESIDENT and not self.pins and not self.pinned


class Tiers:
    """Who is where. The only place that changes a tier."""

    def __init__(self) -> None:
        # absent ones may be many, and nobody goes through them
        self._in: dict[Tier, dict[AdapterRef, Known]] = {it: {} for it in Tier if it is not Tier.ABSENT}

    def of(self, tier: Tier) -> dict[AdapterRef, Known]:
        return self._in[tier]

    def move(self, it: Known, to: Tier) -> None:
        assert (it.tier, to) in MOVES, f"{it.ref.name}: {it.tier} -> {to}"
        if it.tier is not Tier.ABSENT:
            del self._in[it.tier][it.ref]
        if to is not Tier.ABSENT:
            self._in[to][it.ref] = it
        it.tier = to

    def check(self, known: dict[AdapterRef, Known]) -> None:
        for tier, adapters in self._in.items():
            assert adapters == {ref: it for ref, it in known.items() if it.tier is tier}
