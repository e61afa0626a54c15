"""What one adapter can do to another: floods, backlogs, more adapters than fit. Waits are in steps, and bounded."""

import random
from collections import Counter
from statistics import mean

import pytest

from adapters_store.ref import AdapterRef
from server.engine.fake_runner import FakeResidency
from tests.support.breadth import always
from tests.support.driver import Answer
from tests.support.fake_engine import FakeEngine


def steps_until_first_token(setup: FakeEngine, answer: Answer) -> int:
    steps = 0
    while not answer.tokens:
        setup.step()
        steps += 1
        assert steps < 5000
    return steps


@pytest.mark.parametrize(
    ("is_one_group", "blocks", "prompt_len"),  # short of places, short of blocks
    always([(True, 4000, 1), (False, 4000, 1), (True, 100, 40), (False, 100, 40)], (True, 4000, 1), (False, 100, 40)),
)
def test_beside_an_adapter_that_floods_another_ones_single_requests_start_at_once(
    is_one_group: bool, blocks: int, prompt_len: int
) -> None:
    setup = FakeEngine(blocks=blocks, tokens_per_step=64, max_running=16, max_waiting=5000)
    flood, calm = setup.adapter("flood"), setup.adapter("calm")
    for number in range(150):
        setup.add([7] * prompt_len, 300, flood, group=10_000 + (0 if is_one_group else number))
    rng, waits = random.Random(0), list[int]()
    for _ in range(40):
        setup.run(rng.randrange(20))
        waits.append(steps_until_first_token(setup, setup.add([rng.randrange(1000)], 1, calm)))
    assert max(waits) <= 2


def test_a_flood_of_one_adapter_leaves_the_base_and_many_others_their_turns() -> None:
    setup = FakeEngine(blocks=4000, slots=12, tokens_per_step=64, max_running=16, max_waiting=5000)
    flood = setup.adapter("flood")
    others = [None, *(setup.adapter(f"calm {number}") for number in range(10))]
    for _ in range(1000):
        setup.add([7], 300, flood)
    setup.run(5)
    answers = [setup.add([number], 3, ref) for number, ref in enumerate(others) for _ in range(2)]
    setup.run(12)
    assert all(answer.tokens for answer in answers)


class Backlog:
    """Adapters that always have something waiting, and the weighted tokens that each was served."""

    def __init__(self, setup: FakeEngine, weights: dict[str, float], lengths: dict[str, tuple[int, int]]) -> None:
        self.setup, self.weights, self.lengths = setup, weights, lengths
        self.refs = {name: setup.adapter(name) for name in weights}
        self.rng = random.Random(0)
        self.served: Counter[str] = Counter()
        self.open: list[tuple[str, Answer, int]] = []  # and how many of its tokens were counted

    def run(self, steps: int, waiting: int = 10) -> None:
        for _ in range(steps):
            there = Counter(request.account for request in self.setup.scheduler.waiting)
            for name, weight in self.weights.items():
                prompt_len, max_tokens = self.lengths[name]
                for _ in range(waiting - there[name]):
                    prompt = [self.rng.randrange(1000) for _ in range(self.rng.randint(1, prompt_len))]
                    tokens = self.rng.randint(1, max_tokens)
                    self.open.append((name, self.setup.add(prompt, tokens, self.refs[name], weight=weight), 0))
            for scheduled in self.setup.step():
                lane = scheduled.lane
                end = min(scheduled.start + scheduled.num_tokens, lane.prompt_len)
                self.served[lane.request.account] += max(0, end - scheduled.start)
            self._count()

    def _count(self) -> None:
        left = []
        for name, answer, counted in self.open:
            self.served[name] += 2 * (len(answer.tokens) - counted)
            if answer.finish is None:
                left.append((name, answer, len(answer.tokens)))
        self.open = left


WEIGHTS = [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 3.0}, {"a": 0.5, "b": 1.0, "c": 2.5}]


@pytest.mark.parametrize("weights", always(WEIGHTS, WEIGHTS[1]))
def test_where_tokens_are_scarce_each_is_served_in_proportion_to_its_weight_whatever_it_asks_for(
    weights: dict[str, float],
) -> None:
    """At any time two counters differ by no more than what a step and the largest requests can add."""
    budget, longest, most_tokens = 64, 100, 3
    setup = FakeEngine(blocks=2000, slots=3, tokens_per_step=budget, max_running=200, max_waiting=1000)
    lengths = {"a": (longest, most_tokens), "b": (8, 1), "c": (30, 2)}
    backlog = Backlog(setup, weights, lengths)
    least = min(weights.values())
    bound = 2 * max(budget, longest + 2 * most_tokens) / least
    for _ in range(100):
        backlog.run(10, waiting=70)
        counters = [backlog.served[name] / weight for name, weight in weights.items()]
        assert max(counters) - min(counters) <= bound
    assert min(counters) > 10 * bound


@pytest.mark.parametrize("weights", always(WEIGHTS, WEIGHTS[2]))
def test_where_places_are_scarce_those_that_ask_for_the_like_are_served_in_proportion_to_weight(
    weights: dict[str, float],
) -> None:
    setup = FakeEngine(blocks=2000, slots=3, tokens_per_step=256, max_running=16, max_waiting=1000)
    backlog = Backlog(setup, weights, dict.fromkeys(weights, (20, 60)))
    backlog.run(100)
    backlog.served.clear()
    backlog.run(1000)
    counters = [backlog.served[name] / weight for name, weight in weights.items()]
    assert max(counters) <= 1.15 * min(counters)


@pytest.mark.parametrize("others", [1, 3])
def test_who_was_alone_for_long_and_who_stayed_away_for_long_have_neither_debts_nor_savings(others: int) -> None:
    setup = FakeEngine(blocks=2000, slots=4, tokens_per_step=64, max_running=64, max_waiting=1000)
    names = ["old", *(f"new {number}" for number in range(others))]
    lengths = dict.fromkeys(names, (30, 2))
    alone = Backlog(setup, {"old": 1.0}, lengths)
    alone.run(300)
    together = Backlog(setup, dict.fromkeys(names, 1.0), lengths)
    together.run(100, waiting=60)
    assert max(together.served.values()) - min(together.served.values()) <= 2 * 64 + 200


@pytest.mark.parametrize(
    ("adapters", "each", "prompt_len", "max_tokens", "blocks", "most"),
    always([(2, 4, 200, 200, 250, 1.5), (4, 8, 100, 100, 300, 1.6), (3, 16, 150, 40, 170, 1.5),
            (12, 2, 300, 30, 500, 1.2)], (2, 4, 200, 200, 250, 1.5), (3, 16, 150, 40, 170, 1.5)),
)  # fmt: skip
def test_adapters_that_are_short_of_blocks_do_not_take_them_from_each_other_in_turns(
    adapters: int, each: int, prompt_len: int, max_tokens: int, blocks: int, most: float
) -> None:
    """Tokens computed for each that is needed; the rest is recomputed after preemptions."""
    setup = FakeEngine(blocks=blocks, slots=adapters, tokens_per_step=64, max_running=16, max_waiting=1000)
    rng, computed = random.Random(0), 0
    for ref in [setup.adapter(f"adapter {number}") for number in range(adapters)]:
        for _ in range(each):
            setup.add([rng.randrange(1000) for _ in range(prompt_len)], max_tokens, ref)
    while not setup.is_done:
        computed += sum(setup.computed().values())
    assert computed <= most * adapters * each * (prompt_len + max_tokens - 1)


def test_priority_without_end_starves_nobody_for_longer_than_its_patience() -> None:
    setup = FakeEngine(blocks=400, slots=2, max_running=4)
    high, low = setup.adapter("high"), setup.adapter("low")
    late, waits = list[Answer](), list[float]()
    while late or not waits:
        while len(setup.scheduler.waiting) < 20:
            setup.add([2], 5, high, priority=1)
            setup.step()
        if not waits and not late:
            late = [setup.add([1], 3, low, priority=-1) for _ in range(5)]
        setup.now += 0.25
        setup.step()
        waits += [setup.now for answer in late if answer.tokens]
        late = [answer for answer in late if not answer.tokens]
        assert setup.now < 60
    assert 30 < min(waits) and max(waits) < 30 + 5


# -- more adapters than fit -----------------------------------------------------------

SLOTS, LONGEST, LOADS, MAX_SKIPS, EACH = 4, 30, 5, 20, 5


def bound(times: int) -> int:
    """Of a request's wait: its adapter is let in after `max_skips` steps and, for each that was unserved for longer, an
    answer and a transfer; and it may be the last of those that its adapter has, after some of which others drain."""
    return 2 * (MAX_SKIPS + times * SLOTS * (LONGEST + LOADS))


class Crowd:
    """So many adapters for each slot, all of which always have five requests: how long these wait for their first
    token, and how many tokens were computed."""

    def __init__(self, times: int, steps: int) -> None:
        self.setup = FakeEngine(blocks=4000, residency=FakeResidency(SLOTS, LOADS), tokens_per_step=64, max_running=16,
                                max_waiting=5000, max_skips=MAX_SKIPS)  # fmt: skip
        self.rng = random.Random(times)
        self.waits: list[int] = []
        self.computed = 0
        self._open: dict[AdapterRef, list[tuple[int, Answer]]] = {
            self.setup.adapter(f"adapter {number}"): [] for number in range(times * SLOTS)
        }
        for step in range(steps):
            self._step(step)
            unserved = [since for answers in self._open.values() for since, answer in answers if not answer.tokens]
            assert step - min(unserved, default=step) <= bound(times)

    def _step(self, step: int) -> None:
        for ref, answers in self._open.items():
            while len(answers) < EACH:
                prompt = [self.rng.randrange(1000) for _ in range(3)]
                answers.append((step, self.setup.add(prompt, self.rng.randint(1, LONGEST), ref)))
        self.computed += sum(it.num_tokens for it in self.setup.step())
        for ref, answers in self._open.items():
            self.waits += [step - since for since, answer in answers if len(answer.tokens) == 1]
            self._open[ref] = [(since, answer) for since, answer in answers if answer.finish is None]


@pytest.mark.parametrize("all_times", always([[1, 2, 4], [1, 2, 4, 16]], [1, 2, 4]), ids=str)
def test_the_more_adapters_there_are_for_each_slot_the_longer_is_the_wait_and_there_is_no_cliff(
    all_times: list[int],
) -> None:
    crowds = {times: Crowd(times, 1500) for times in all_times}
    computed = [crowd.computed for crowd in crowds.values()]
    assert min(computed) >= 0.9 * max(computed)  # no step waits until a whole batch has drained
    waits = [mean(crowd.waits) for crowd in crowds.values()]
    assert waits == sorted(waits)
    per_adapter = [mean(crowd.waits) / times for times, crowd in crowds.items()]
    assert max(per_adapter) <= 6 * min(per_adapter)  # in proportion, more or less
