"""The engine without a model: random adds, steps, aborts, adapter arrivals and removals, every invariant each step."""

import random
from collections import Counter, deque
from collections.abc import Callable

import msgspec

from adapters_store.ref import AdapterRef
from server.engine.fake_masks import TOO_MUCH, FakeMasks, expected_under
from server.engine.fake_model import expected_logprobs, expected_of_prompt
from server.engine.fake_runner import FakeResidency, expected_tokens
from server.engine.kv_cache import KVCache
from server.engine.plan import Plan
from server.engine.request import Fault, FinishReason, LaneSpec, OfPrompt
from server.engine.scheduler import SchedulerLimits
from tests.support.driver import GREEDY, Answer, Driver
from tests.support.watchful import Watchful

VOCAB = 50  # small, so that prompts share prefixes and stop tokens occur
BLOCK = 4
BLOCKS = 24
LOGITS = 3  # a step, of prompts that are told of: fewer than many prompts have
MOST_RUNNING = 6

LOGPROBS = msgspec.structs.replace(GREEDY, num_logprobs=2)


class Simulation(Driver):
    """An engine over FakeRunner, and the answers that it owes."""

    def __init__(
        self,
        slots: int = 3,
        polls_to_load: int = 2,
        tokens_per_step: int = 16,
        overlaps: bool = False,
        make_runner: Callable[..., Watchful] = Watchful,
    ) -> None:
        """make_runner: with Watchful's arguments."""
        limits = SchedulerLimits(tokens_per_step=tokens_per_step, max_running=MOST_RUNNING, max_waiting=30,
                                 max_skips=10, logits_per_step=LOGITS, target_inter_token_s=0.05,
                                 overlaps=overlaps)  # fmt: skip
        self.counts: Counter[str] = Counter()
        self._masks = FakeMasks(VOCAB, most_looks=8 if overlaps else 4)  # who waits for a step gives its mask time
        self._runner = make_runner(BLOCKS, BLOCK, VOCAB, self.counts, self._masks, LOGITS + MOST_RUNNING)
        super().__init__(limits, KVCache(BLOCKS, BLOCK), self._runner, FakeResidency(slots, polls_to_load),
                         masks=self._masks)  # fmt: skip
        self.served: list[AdapterRef] = []
        self.live: list[Answer] = []
        self.aborted: set[int] = set()
        self.idle_steps = 0
        self._slots = slots
        self._pinned: set[AdapterRef] = set()
        self._pinned_there: set[AdapterRef] = set()  # those of them that were on the device after the last step
        self._leaving: set[AdapterRef] = set()  # removed, and not gone
        self._tombs: list[AdapterRef] = []  # those of them that were held after the last step
        self._back: set[AdapterRef] = set()  # since the last step; what held them may end first
        self._checks: dict[int, AdapterRef] = {}  # under way
        self._ever_sick: set[str] = set()  # revisions
        self._adapters_of: dict[int, list[AdapterRef]] = {}  # by request
        self._num_adapters = 0
        self._lanes: deque[LaneSpec] = deque(maxlen=10)  # the last requests' first ones
        self._group, self._weight, self._priority = 0, 1.0, 0

    def add_adapter(self) -> None:
        self._num_adapters += 1
        # a few names, always new weights: the same name comes to mean other revisions
        ref = AdapterRef(f"adapter-{self._num_adapters % 4}", f"revision-{self._num_adapters}", "lora")
        self.served.append(self.register(ref))
        self.counts["adapters added"] += 1

    def come_back(self, rng: random.Random) -> None:
        """A removed adapter that requests still hold is registered again."""
        if self._tombs:
            ref = self._tombs.pop(rng.randrange(len(self._tombs)))
            self._leaving.remove(ref)
            self._back.add(ref)
            self.served.append(self.register(ref))
            self.counts["adapters that came back"] += 1

    def remove_adapter(self, rng: random.Random) -> None:
        candidates = [ref for ref in self.served if ref not in self._back]
        if candidates:
            ref = rng.choice(candidates)
            self.served.remove(ref)
            self.remove(ref)
            self._leaving.add(ref)
            self._pinned.discard(ref)
            self.counts["adapters removed"] += 1

    def turn_sick_or_well(self, rng: random.Random) -> None:
        """What comes out of an adapter is no number any more, or is one again."""
        if self.served:
            revision = rng.choice(self.served).revision
            self._runner.not_finite ^= {revision}
            self._ever_sick.add(revision)

    def pin_or_unpin(self, rng: random.Random) -> None:
        """At most all slots but one are pinned, and nothing new while requests wait for what is: whoever pins leaves
        room for the others."""
        if self.served and self.idle_steps < 10:
            unpins = self._pinned and rng.random() < 0.7
            ref = rng.choice(sorted(self._pinned, key=lambda it: it.revision) if unpins else self.served)
            pins = ref not in self._pinned and len(self._pinned) + 1 < self._slots
            (self._pinned.add if pins else self._pinned.discard)(ref)
            self.register(ref, pinned=pins)
            self.counts["adapters pinned"] += pins

    def add_request(self, rng: random.Random) -> None:
        stops = frozenset(rng.sample(range(VOCAB), rng.randrange(3)))
        if rng.random() < 0.4:  # else it is one more of the last group
            self._group = len(self.answers)
            self._weight, self._priority = rng.choice([1.0, 1.0, 0.3, 7.0]), rng.choice([0, 0, 0, -1, 5])
        lanes = [self._said_before(rng) or self._lane(rng)]
        self._lanes.append(lanes[0])
        while rng.random() < 0.1:
            lanes.append(self._lane(rng))
        of_prompt, pooled = self._of_prompt(rng)
        self.live.append(self.add(lanes[0].prompt, 0 if pooled else rng.randrange(90), lanes[0].adapter,
                                  rng.choice([GREEDY, GREEDY, LOGPROBS]), stop_token_ids=stops, group=self._group,
                                  beside=lanes[1:], weight=self._weight, priority=self._priority,
                                  salt=lanes[0].salt, of_prompt=of_prompt, grammar=self._grammar(rng)))  # fmt: skip
        self._adapters_of[self.live[-1].id] = [lane.adapter for lane in lanes if lane.adapter is not None]
        self.counts["requests"] += 1
        self.counts["requests of several lanes"] += len(lanes) > 1

    def _grammar(self, rng: random.Random) -> str | None:
        if rng.random() < 0.7:
            return None
        return f"{TOO_MUCH}{rng.randrange(30)}" if rng.random() < 0.4 else f"grammar {rng.randrange(5)}"

    def _said_before(self, rng: random.Random) -> LaneSpec | None:
        """A prompt that came not long ago, which the prefix cache may know."""
        lanes = [it for it in self._lanes if it.adapter is None or it.adapter in self.served]
        return rng.choice(lanes) if lanes and rng.random() < 0.4 else None

    def _of_prompt(self, rng: random.Random) -> tuple[OfPrompt | None, bool]:
        """And whether that is all that is asked for."""
        if rng.random() < 0.5:
            return None, False
        pooling = rng.choice([None, None, None, "mean", "last", "last"])
        return OfPrompt(rng.choice([None, 0, 3]) if pooling != "last" else rng.choice([None, None, 3]), pooling), bool(
            pooling
        )

    def _lane(self, rng: random.Random) -> LaneSpec:
        return LaneSpec(self._prompt(rng), rng.choice([None, *self.served]), rng.choice(["", "", "salt"]))

    def _prompt(self, rng: random.Random) -> list[int]:
        shared = [rng.randrange(2)] * rng.randrange(16)  # common prefixes: cache hits
        return shared + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 20))]

    def abort_one(self, rng: random.Random) -> None:
        if self.live:
            answer = rng.choice(self.live)
            self.abort(answer)
            self.aborted.add(answer.id)

    def check_adapter(self, rng: random.Random) -> None:
        if self.served:
            ref = rng.choice(self.served)
            self._checks[self.ask_for_check(ref, rng.randrange(1, BLOCKS * BLOCK + 1))] = ref
            self.counts["checks"] += 1

    def step(self) -> Plan:
        self.now += 0.5  # so that some wait for longer than their priority lasts
        plan = super().step()
        num_tokens = sum(scheduled.num_tokens for scheduled in plan)
        self.engine.took(0.01 + 0.002 * num_tokens)  # a long one cuts what prompts get, where there is more than a few
        for answer in self.live:
            if answer.finish is not None:
                self._verify(answer)
        self.live = [answer for answer in self.live if answer.finish is None]
        self._bury()
        self.counts["steps"] += 1
        self.counts["tokens"] += num_tokens
        # progress: an engine with requests may wait for a transfer, but not for ever
        self.idle_steps = 0 if plan or not self.live else self.idle_steps + 1
        assert self.idle_steps < 50
        if self.idle_steps == 25:
            self._unpin_what_is_in_the_way()
        resident = {it.ref for it in self.residency.report()}
        self.counts["pinned, and waiting for room"] += not self._pinned <= resident
        assert self._pinned_there & self._pinned <= resident, "a pinned adapter made room"
        self._pinned_there = self._pinned & resident
        return plan

    def _bury(self) -> None:
        """What was removed has gone, once, if no request holds it."""
        held = {ref for answer in self.live if (request := self.request(answer)) for ref in request.adapters}
        self._checks = {number: ref for number, ref in self._checks.items() if number not in self.checked}
        held |= set(self._checks.values())
        for gone in self.gone:
            if gone.ref not in self._back:
                assert gone.ref not in held
                self._leaving.remove(gone.ref)
        self.gone.clear()
        self._back.clear()
        assert self._leaving <= held
        self._tombs = sorted(self._leaving, key=lambda ref: ref.revision)

    def _unpin_what_is_in_the_way(self) -> None:
        """A request of several adapters may need the room of pinned ones; nothing else of theirs stops an engine."""
        wanted = [{lane.adapter for lane in it.lanes if lane.adapter} for it in self.scheduler.waiting]
        assert any(len(refs | self._pinned) > self._slots for refs in wanted)
        for ref in self._pinned:
            self.register(ref)
        self._pinned.clear()

    def _verify(self, answer: Answer) -> None:
        self.counts[str(answer.finish)] += 1
        asked = answer.adapter, answer.prompt, len(answer.tokens), VOCAB
        expected = expected_tokens(*asked) if answer.grammar is None else expected_under(answer.grammar, *asked)
        assert answer.tokens == expected
        self.counts["constrained"] += answer.grammar is not None
        assert not answer.stop_token_ids & set(answer.tokens[:-1])
        self._verify_what_is_told(answer)
        match answer.finish:
            case FinishReason.LENGTH:
                assert len(answer.tokens) == answer.max_tokens
            case FinishReason.STOP:
                assert answer.tokens[-1] in answer.stop_token_ids
            case FinishReason.ABORT:
                assert answer.id in self.aborted
            case _ if answer.error == "the output is not finite":
                assert self._had_adapters(answer)
                self.counts["not finite"] += 1
                self.counts["quarantined"] += answer.fault is Fault.QUARANTINED
            case _ if answer.fault is Fault.GRAMMAR:
                assert answer.grammar is not None
                assert len(answer.tokens) >= int(answer.grammar.removeprefix(TOO_MUCH))
                self.counts["grammars that broke"] += 1
            case _ if answer.fault is Fault.QUARANTINED:
                assert str(answer.error).endswith("requests in a row")
                self.counts["ended by a quarantine"] += 1
            case _:
                assert not answer.tokens and answer.error is not None and answer.fault is None
                said = ("tokens of KV cache; there are", "are waiting, as many as", "adapters for")
                assert any(it in answer.error for it in said), answer.error

    def _had_adapters(self, answer: Answer) -> bool:
        """Of which some gave no numbers at some time."""
        return bool({ref.revision for ref in self._adapters_of[answer.id]} & self._ever_sick)

    def _verify_what_is_told(self, answer: Answer) -> None:
        """Driver has seen to it that nothing is told twice, or later than with the first token."""
        num, tokens = answer.sampling.num_logprobs, [*answer.prompt, *answer.tokens]
        said = None if num is None else expected_logprobs(answer.adapter, tokens, len(answer.prompt), num, VOCAB)
        assert answer.logprobs == (said or [None] * len(answer.tokens))
        it = answer.of_prompt
        is_owed = it is not None and (it.num_logprobs is not None or it.pooling is not None)
        has_begun = bool(answer.tokens) or answer.finish in (FinishReason.LENGTH, FinishReason.STOP)
        if it is None or not is_owed or not has_begun:
            assert answer.told is None
        else:
            assert answer.told == expected_of_prompt(answer.adapter, answer.prompt, it, VOCAB)
            self.counts["prompts told of"] += it.num_logprobs is not None
            self.counts["prompts pooled"] += it.pooling is not None

    def drain(self) -> None:
        """Every request that is left must come to its end, and give everything back."""
        for _ in range(20_000):
            if self.is_done and len(self.checked) == self.counts["checks"]:
                break
            self.step()
        assert not self.live and not self.scheduler.has_requests
        assert len(self.checked) == self.counts["checks"]
        said = {it.error for it in self.checked.values()} - {None}
        assert all("is in quarantine" in it for it in said if it)  # none was asked for after its adapter's removal
        assert self.kv_cache.pool.num_free == BLOCKS
        assert not self._masks.num_open()
        assert not self._leaving


def simulate(steps: int, seed: int, overlaps: bool, make_runner: Callable[..., Watchful] = Watchful) -> Counter[str]:
    rng = random.Random(seed)
    simulation = Simulation(tokens_per_step=48 if seed % 2 else 16, overlaps=overlaps, make_runner=make_runner)
    for _ in range(steps):
        match rng.random():
            case x if x < 0.22:
                simulation.add_request(rng)
            case x if x < 0.25:
                simulation.abort_one(rng)
            case x if x < 0.27:
                simulation.add_adapter()
            case x if x < 0.29:
                simulation.remove_adapter(rng)
            case x if x < 0.31:
                simulation.pin_or_unpin(rng)
            case x if x < 0.32:
                simulation.come_back(rng)
            case x if x < 0.325:
                simulation.check_adapter(rng)
            case x if x < 0.33:
                simulation.turn_sick_or_well(rng)
        simulation.step()
    simulation.drain()
    simulation.counts["preemptions"] = simulation.scheduler.num_preemptions
    simulation.counts["prefix hits (tokens)"] = simulation.kv_cache.num_prefix_hits
    return simulation.counts
