"""A runner without a model, for tests and simulation: it ships so that users' tests can use it too.

The next token is a hash of the adapter's revision and all tokens so far, so the right answer of a request is known
without running anything. And it keeps a KV cache of its own: every KV slot remembers which adapter and which prefix
wrote it, and every read is checked, so a block that leaks from one request or adapter to another is caught at once.
"""

import hashlib
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from server.engine.messages import AdapterOnDevice
from server.engine.plan import Output, Plan, Scheduled
from server.engine.request import Lane, Slot, Token
from server.engine.residency import Wait


def _fingerprint(previous: bytes, token: int) -> bytes:
    return hashlib.blake2b(previous + token.to_bytes(8, "little"), digest_size=8).digest()


def _start(adapter: AdapterRef | None) -> bytes:
    return hashlib.blake2b(adapter.revision.encode() if adapter else b"", digest_size=8).digest()


def expected_tokens(adapter: AdapterRef | None, prompt: Sequence[int], count: int, vocab_size: int) -> list[int]:
    """What FakeRunner generates for this prompt, whatever else is in the batch."""
    state = _start(adapter)
    for token in prompt:
        state = _fingerprint(state, token)
    tokens: list[int] = []
    for _ in range(count):
        tokens.append(int.from_bytes(state, "little") % vocab_size)
        state = _fingerprint(state, tokens[-1])
    return tokens


@dataclass(frozen=True)
class Known:
    """A step whose outputs are there already."""

    by_lane: Mapping[Lane, Output]

    def outputs(self) -> Mapping[Lane, Output]:
        return self.by_lane


class FakeRunner:
    def __init__(self, num_blocks: int, block_size: int, vocab_size: int = 1000) -> None:
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._written: list[bytes] = [b""] * (num_blocks * block_size)  # by KV slot: the prefix that ends there

    def launch(self, plan: Plan) -> Known:
        tokens = {scheduled.lane: self._compute(scheduled) for scheduled in plan}
        return Known({it.lane: self._output(it.lane, tokens[it.lane]) for it in plan if it.samples})

    @staticmethod
    def _output(lane: Lane, token: int) -> Output:
        return Output((Token(token),)) if lane.request.max_tokens else Output()

    def _compute(self, scheduled: Scheduled) -> int:
        """The next token of the lane."""
        lane = scheduled.lane
        state = _start(lane.adapter)
        for position in range(scheduled.start + scheduled.num_tokens):
            state = _fingerprint(state, lane.tokens[position])
            block, offset = lane.block_table[position // self._block_size], position % self._block_size
            kv_slot = block * self._block_size + offset
            if position >= scheduled.start:
                self._written[kv_slot] = state
            elif self._written[kv_slot] != state:
                raise AssertionError(f"request {lane.request.id} reads another prefix's KV at position {position}")
        return int.from_bytes(state, "little") % self._vocab_size


class FakeResidency:
    """Adapters that become resident after a number of polls, in a fixed number of slots, least recently used first."""

    def __init__(self, slots: int, polls_to_load: int = 0) -> None:
        self._polls_to_load = polls_to_load
        self._free_slots = array("i", range(slots, 0, -1))
        self._known: set[AdapterRef] = set()
        self._slot: dict[AdapterRef, Slot] = {}  # in order of last use
        self._countdown: dict[AdapterRef, int] = {}
        self._pins: dict[AdapterRef, int] = {}

    def register(self, ref: AdapterRef, package: AdapterPackage) -> None:
        self._known.add(ref)

    def forget(self, ref: AdapterRef) -> None:
        assert not self._pins.get(ref)
        self._known.remove(ref)
        if ref in self._slot:
            self._evict(ref)

    def refusal(self, refs: Collection[AdapterRef]) -> str | None:
        together = len(self._free_slots) + len(self._slot)
        return f"{len(refs)} adapters for {together} slots" if len(refs) > together else None

    def poll(self) -> None:
        self._countdown = {ref: max(0, polls - 1) for ref, polls in self._countdown.items()}

    def acquire(self, ref: AdapterRef) -> Slot | Wait:
        assert ref in self._known
        if ref not in self._slot:
            idle = next(
                (other for other in self._slot if not self._pins.get(other) and not self._countdown[other]), None
            )
            if not self._free_slots and idle is None:
                return Wait.NO_ROOM
            if not self._free_slots and idle is not None:
                self._evict(idle)
            self._slot[ref] = self._free_slots.pop()
            self._countdown[ref] = self._polls_to_load
        if self._countdown[ref] > 0:
            return Wait.LOADING
        self._slot[ref] = self._slot.pop(ref)
        self._pins[ref] = self._pins.get(ref, 0) + 1
        return self._slot[ref]

    def release(self, ref: AdapterRef) -> None:
        self._pins[ref] -= 1

    def is_loading(self) -> bool:
        return any(self._countdown.values())

    def report(self) -> tuple[AdapterOnDevice, ...]:
        return tuple(AdapterOnDevice(ref, "resident", 0, self._pins.get(ref, 0)) for ref in self._slot)

    def check(self) -> None:
        slots = [*self._slot.values(), *self._free_slots]
        assert len(set(slots)) == len(slots)
        assert all(pins >= 0 for pins in self._pins.values())
        assert all(ref in self._slot for ref, pins in self._pins.items() if pins)

    def _evict(self, ref: AdapterRef) -> None:
        self._free_slots.append(self._slot.pop(ref))
        del self._countdown[ref]
        self._pins.pop(ref, None)
