"""What the scheduler asks of the paged weight manager, and no more. The real one is server/weights/residency.py."""

import enum
from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from server.engine.messages import AdapterMoved, Memory
from server.engine.request import Fault, Slot


class Wait(enum.Enum):
    """Why an adapter is not on the device yet."""

    LOADING = enum.auto()  # its transfer is under way
    NO_ROOM = enum.auto()  # everything that could make room is pinned


class AdapterOnDevice(NamedTuple):
    """Residency of one adapter. `pins` counts running lanes; `bytes` is what its pages occupy."""

    ref: AdapterRef
    state: str
    bytes: int
    pins: int


class AdapterFailed(Exception):
    """The adapter cannot be brought to the device. The message is for a user who knows it by this reference's name."""

    def __init__(self, ref: AdapterRef, reason: str, fault: Fault = Fault.UNAVAILABLE) -> None:
        state = "is in quarantine" if fault is Fault.QUARANTINED else "could not be loaded"
        super().__init__(f"the adapter {ref.name!r} {state}: {reason}")
        self.ref, self.reason, self.fault = ref, reason, fault


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

    def poll(self, now: float) -> None:
        """Take note of finished transfers, and start those of pinned adapters. Once a step: within a step, what is
        loading stays so. now: seconds of a monotonic clock."""

    def acquire(self, ref: AdapterRef) -> Slot | Wait:
        """Pin the adapter and say where it is; or start to bring it in, pin nothing, and say why it must wait.

        An adapter whose transfer is under way is never evicted for another: else two that want the last room would
        evict each other for ever, and the first request in line would never run.

        Raises AdapterFailed once if the transfer failed; a later call tries again, unless it is quarantined.
        """

    def is_resident(self, ref: AdapterRef) -> bool:
        """Whether `acquire` would pin it at once, and take nobody's room."""

    def in_the_way(self, refs: Collection[AdapterRef]) -> Collection[AdapterRef]:
        """Of those that have pins, some without which these would have room: as few as will do. Empty where idle ones
        make room enough, or where not even all of them would."""

    def claim(self, refs: Collection[AdapterRef]) -> None:
        """Requests have waited for room for these for too long: until the next call nobody else takes what they lack,
        and KV blocks give it back as their requests end. Without any: nobody waits so."""

    def prefetch(self, refs: Sequence[AdapterRef]) -> None:
        """Requests wait for these, and cannot run yet: bring them nearer, the first ones first, where that takes room
        from nobody. Cheap where there is nothing to do: called in every step."""

    def quarantine(self, ref: AdapterRef, reason: str) -> None:
        """Its outputs were found wanting: `acquire` raises AdapterFailed until it is registered again. Pins stay until
        they are released."""

    def take_moved(self) -> list[AdapterMoved]:
        """Those whose tier has changed since the last call."""

    def memory(self) -> Memory:
        """What KV blocks and adapters have of the device now. Asked in most steps."""

    def release(self, ref: AdapterRef) -> None:
        """Undo one successful acquire."""

    def is_loading(self) -> bool:
        """Whether a transfer is under way, so that an idle loop knows to look again soon."""

    def report(self) -> tuple[AdapterOnDevice, ...]:
        """What is on the device now, or on its way: for tests and measurements, it walks over all of them."""

    def check(self) -> None:
        """Recompute what is kept incrementally."""
