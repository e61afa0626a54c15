"""A runner without a model, for tests and simulation: it ships so that users' tests can use it too.

What it computes is fake_model.py's, so the right answer of a request is known without running anything. Of how a
request wants its tokens chosen it looks at masks only. And it keeps a KV cache of its own: every KV slot remembers
which adapter and which prefix wrote it, and under which salt, and every read is checked, so a block that leaks from one
request, adapter or salt to another is caught at once.
"""

from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from server.engine.block_pool import Block
from server.engine.checks import Found
from server.engine.fake_model import Seen, State, expected_tokens, following, logprobs, next_allowed, next_token, start
from server.engine.masks import Mask, MaskSource
from server.engine.messages import AdapterMoved, Memory
from server.engine.plan import Output, Plan, Scheduled
from server.engine.request import Fault, Lane, Request, Slot, Tier, Token, ToldOfPrompt
from server.engine.residency import AdapterFailed, AdapterOnDevice, Wait

__all__ = ["FakeChecker", "FakeResidency", "FakeRunner", "Known", "expected_tokens"]


@dataclass(frozen=True)
class Known:
    """A step whose outputs are there already."""

    by_lane: Mapping[Lane, Output]

    def outputs(self) -> Mapping[Lane, Output]:
        return self.by_lane


class FakeRunner:
    def __init__(
        self, num_blocks: int, block_size: int, vocab_size: int = 1000, masks: MaskSource | None = None
    ) -> None:
        self._block_size = block_size
        self._vocab_size, self._masks = vocab_size, masks
        self._chosen: dict[Request, int] = {}  # by the last step
        self.not_finite: set[str] = set()  # revisions of adapters with which nothing comes out that is a number
        # by KV slot: the salt and the prefix that ends there. A salt changes no token, only who may read them
        self._written: list[tuple[str, bytes]] = [("", b"")] * (num_blocks * block_size)

    def launch(self, plan: Plan) -> Known:
        states = {it.lane: self._compute(it) for it in plan}
        told = {it.lane: self._tell(it, states[it.lane]) for it in plan if it.of_prompt is not None}
        masks = self._collected(plan)
        outputs = {
            it.lane: self._output(it.lane, states[it.lane][-1], told.get(it.lane), masks) for it in plan if it.samples
        }
        self._chosen = {lane.request: it.tokens[-1].id if it.tokens else 0 for lane, it in outputs.items()}
        return Known(outputs)

    def _collected(self, plan: Plan) -> Mapping[int, Mask]:
        ids = [it.lane.request.id for it in plan if it.chooses and it.lane.request.is_constrained]
        if not ids:
            return {}
        assert self._masks is not None
        return self._masks.collect(ids, lambda: False, may_wait=len(ids) == len({it.lane.request.id for it in plan}))

    def _output(self, lane: Lane, state: State, told: ToldOfPrompt | None, masks: Mapping[int, Mask]) -> Output:
        if any(ref.revision in self.not_finite for ref in lane.request.adapters):
            return Output(error="the output is not finite", is_not_finite=True)
        if not lane.request.max_tokens:
            return Output(of_prompt=told)
        token = next_token(state, self._vocab_size)
        if lane.request.is_constrained:
            if lane.request.id not in masks:
                return Output(of_prompt=told, is_late=True)
            token = next_allowed(state, self._vocab_size, masks[lane.request.id])
        num = lane.request.sampling.num_logprobs
        said = None if num is None else logprobs(state, token, num, self._vocab_size)
        return Output((Token(token, said),), of_prompt=told)

    def _compute(self, scheduled: Scheduled) -> list[State]:
        """Those behind each token that is computed."""
        lane = scheduled.lane
        state = start(lane.adapter)
        states: list[State] = []
        for position in range(scheduled.start + scheduled.num_tokens):
            is_known = position < len(lane.tokens)
            state = following(state, lane.tokens[position] if is_known else self._chosen[lane.request])
            block, offset = lane.block_table[position // self._block_size], position % self._block_size
            kv_slot = block * self._block_size + offset
            if position >= scheduled.start:
                self._written[kv_slot] = lane.salt, state
                states.append(state)
            elif self._written[kv_slot] != (lane.salt, state):
                raise AssertionError(f"request {lane.request.id} reads another prefix's KV at position {position}")
        return states

    def _tell(self, scheduled: Scheduled, states: Sequence[State]) -> ToldOfPrompt | None:
        """Of the chunk of a prompt; with the last one, what is to be told."""
        lane, of_prompt = scheduled.lane, scheduled.of_prompt
        assert of_prompt is not None
        if scheduled.start == 0 or not isinstance(lane.carried, Seen):
            lane.carried = Seen()
        for position, state in enumerate(states, start=scheduled.start):
            behind = lane.tokens[position + 1] if position + 1 < lane.prompt_len else None
            lane.carried.take(state, behind, of_prompt.num_logprobs, self._vocab_size)
        return lane.carried.told(of_prompt, lane.prompt_len) if scheduled.samples else None


class FakeChecker:
    """One that finds no difference, and whose comparisons read nothing."""

    def refusal(self, num_tokens: int) -> str | None:
        return None

    def compare(self, ref: AdapterRef, num_tokens: int) -> "FakeComparison":
        return FakeComparison()


class FakeComparison:
    def run_adapter(self, slot: Slot, blocks: Sequence[Block]) -> None:
        assert slot and blocks

    def is_ready(self) -> bool:
        return True

    def run_merged(self, blocks: Sequence[Block]) -> Found:
        assert blocks
        return Found(0.0, 1.0)


class FakeResidency:
    """Adapters that become resident after a number of polls, in a fixed number of slots, least recently used first."""

    BYTES_EACH = 1000

    def __init__(self, slots: int, polls_to_load: int = 0) -> None:
        self._polls_to_load = polls_to_load
        self._free_slots = array("i", range(slots, 0, -1))
        self._known: set[AdapterRef] = set()
        self._pinned: set[AdapterRef] = set()
        self._wanted: dict[AdapterRef, None] = {}  # pinned and not there
        self._slot: dict[AdapterRef, Slot] = {}  # in order of last use
        self._countdown: dict[AdapterRef, int] = {}
        self._pins: dict[AdapterRef, int] = {}
        self._quarantined: dict[AdapterRef, str] = {}  # and why
        self._moved: list[AdapterMoved] = []

    def register(self, ref: AdapterRef, package: AdapterPackage, pinned: bool = False) -> None:
        self._known.add(ref)
        self._quarantined.pop(ref, None)
        (self._pinned.add if pinned else self._pinned.discard)(ref)
        self._note_wanted(ref)

    def unpin(self, ref: AdapterRef) -> None:
        self._pinned.discard(ref)
        self._note_wanted(ref)

    def forget(self, ref: AdapterRef) -> int:
        assert not self._pins.get(ref)
        self._known.remove(ref)
        self._quarantined.pop(ref, None)
        self.unpin(ref)
        if ref not in self._slot:
            return 0
        self._evict(ref)
        return self.BYTES_EACH

    def refusal(self, refs: Collection[AdapterRef]) -> str | None:
        together = len(self._free_slots) + len(self._slot)
        return f"{len(refs)} adapters for {together} slots" if len(refs) > together else None

    def poll(self, now: float) -> None:
        arrived = [ref for ref, polls in self._countdown.items() if polls == 1]
        self._moved += [AdapterMoved(ref, Tier.RESIDENT, self.BYTES_EACH, load_s=0.0) for ref in arrived]
        self._countdown = {ref: max(0, polls - 1) for ref, polls in self._countdown.items()}
        for ref in tuple(self._wanted):
            self._bring(ref)

    def acquire(self, ref: AdapterRef) -> Slot | Wait:
        assert ref in self._known
        if ref in self._quarantined:
            raise AdapterFailed(ref, self._quarantined[ref], Fault.QUARANTINED)
        if ref not in self._slot and not self._bring(ref):
            return Wait.NO_ROOM
        if self._countdown[ref] > 0:
            return Wait.LOADING
        self._slot[ref] = self._slot.pop(ref)
        self._pins[ref] = self._pins.get(ref, 0) + 1
        return self._slot[ref]

    def release(self, ref: AdapterRef) -> None:
        self._pins[ref] -= 1

    def is_resident(self, ref: AdapterRef) -> bool:
        return self._countdown.get(ref, 1) == 0 and ref not in self._quarantined

    def in_the_way(self, refs: Collection[AdapterRef]) -> Collection[AdapterRef]:
        needed = len(set(refs) - set(self._slot))
        idle = [ref for ref in self._slot if self._may_go(ref) and ref not in refs]
        missing = needed - len(self._free_slots) - len(idle)
        busy = [ref for ref in self._slot if self._pins.get(ref) and ref not in refs and ref not in self._pinned]
        return busy[:missing] if 0 < missing <= len(busy) else []

    def claim(self, refs: Collection[AdapterRef]) -> None:
        """Slots are all that there is to lack."""

    def prefetch(self, refs: Sequence[AdapterRef]) -> None:
        for ref in refs:
            if ref not in self._slot and self._free_slots and ref not in self._quarantined:
                self._bring(ref)

    def quarantine(self, ref: AdapterRef, reason: str) -> None:
        self._quarantined[ref] = reason
        self._moved.append(AdapterMoved(ref, Tier.QUARANTINED, reason=reason))

    def memory(self) -> Memory:
        return Memory(adapter_bytes=self.BYTES_EACH * len(self._slot))

    def take_moved(self) -> list[AdapterMoved]:
        moved, self._moved = self._moved, []
        return moved

    def is_loading(self) -> bool:
        return any(self._countdown.values())

    def report(self) -> tuple[AdapterOnDevice, ...]:
        return tuple(AdapterOnDevice(ref, "resident", self.BYTES_EACH, self._pins.get(ref, 0)) for ref in self._slot)

    def check(self) -> None:
        slots = [*self._slot.values(), *self._free_slots]
        assert len(set(slots)) == len(slots)
        assert all(pins >= 0 for pins in self._pins.values())
        assert all(ref in self._slot for ref, pins in self._pins.items() if pins)
        assert set(self._slot) | self._pinned <= self._known
        assert set(self._wanted) == self._pinned - set(self._slot)

    def _bring(self, ref: AdapterRef) -> bool:
        """Start its transfer, if there is a slot or one can be made free."""
        if not self._free_slots:
            idle = next(filter(self._may_go, self._slot), None)
            if idle is None:
                return False
            self._evict(idle)
        self._slot[ref] = self._free_slots.pop()
        self._countdown[ref] = self._polls_to_load
        self._moved.append(AdapterMoved(ref, Tier.LOADING if self._polls_to_load else Tier.RESIDENT, self.BYTES_EACH))
        self._note_wanted(ref)
        return True

    def _may_go(self, ref: AdapterRef) -> bool:
        return not self._pins.get(ref) and not self._countdown[ref] and ref not in self._pinned

    def _note_wanted(self, ref: AdapterRef) -> None:
        if ref in self._pinned and ref not in self._slot:
            self._wanted[ref] = None
        else:
            self._wanted.pop(ref, None)

    def _evict(self, ref: AdapterRef) -> None:
        self._free_slots.append(self._slot.pop(ref))
        self._moved.append(AdapterMoved(ref, Tier.ABSENT, was_evicted=ref in self._known))
        del self._countdown[ref]
        self._pins.pop(ref, None)
