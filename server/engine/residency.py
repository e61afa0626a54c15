"""What the scheduler asks of the paged weight manager, and no more. The real one is server/weights/residency.py."""

import enum
from collections.abc import Collection
from typing import Protocol

from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from server.engine.messages import AdapterOnDevice
from server.engine.request import Slot


class Wait(enum.Enum):
    """Why an adapter is not on the device yet."""

    LOADING = enum.auto()  # its transfer is under way
    NO_ROOM = enum.auto()  # everything that could make room is pinned


class AdapterFailed(Exception):
    """The adapter cannot be brought to the device. The message is for a user who knows it by this reference's name."""

    def __init__(self, ref: AdapterRef, reason: str) -> None:
        super().__init__(f"the adapter {ref.name!r} could not be loaded: {reason}")
        self.ref, self.reason = ref, reason


class Residency(Protocol):
    """Adapters on the device, by revision. Called from the step loop: nothing here waits."""

    def register(self, ref: AdapterRef, package: AdapterPackage, pinned: bool = False) -> None:
        """The adapter exists and may be asked for.

        A pinned one is brought in as soon as there is room, unasked, and never makes room for another. That the others
        still have room is up to whoever pins. Where its transfer fails, nothing more is done until somebody asks for it
        or it is registered again.
        """

    def unpin(self, ref: AdapterRef) -> None:
        """It may make room again."""

    def forget(self, ref: AdapterRef) -> int:
        """Nobody will ask again, and nobody holds a pin: its room may be used. The bytes that it occupies, which are
        free now, or as soon as its transfer has ended."""

    def refusal(self, refs: Collection[AdapterRef]) -> str | None:
        """Why these can never be on the device together, if so. Asked for several that one request needs at once."""

    def poll(self) -> None:
        """Take note of finished transfers, and start those of pinned adapters. Once a step: within a step, what is
        loading stays so."""

    def acquire(self, ref: AdapterRef) -> Slot | Wait:
        """Pin the adapter and say where it is; or start to bring it in, pin nothing, and say why it must wait.

        An adapter whose transfer is under way is never evicted for another: else two that want the last room would
        evict each other for ever, and the first request in line would never run.

        Raises AdapterFailed once if the transfer failed; a later call tries again.
        """

    def release(self, ref: AdapterRef) -> None:
        """Undo one successful acquire."""

    def is_loading(self) -> bool:
        """Whether a transfer is under way, so that an idle loop knows to look again soon."""

    def report(self) -> tuple[AdapterOnDevice, ...]:
        """What is on the device now, or on its way."""

    def check(self) -> None:
        """Recompute what is kept incrementally."""
