"""Steps that take time, in a simulation that says how much: what neighbours of prompts wait for their next token."""

import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from adapters_store.ref import AdapterRef
from server.engine.fake_runner import FakeResidency, Known
from server.engine.kv_cache import KVCache
from server.engine.plan import Output, Plan
from server.engine.prompts import Load
from server.engine.request import Lane, Token
from server.engine.residency import Wait
from server.engine.scheduler import SchedulerLimits
from server.engine.step_budget import StepBudget, StepTimes, Work, work_of
from tests.support.breadth import always
from tests.support.driver import Answer, Driver


@dataclass
class Costs:
    """Of a step, in seconds. Like those of a model of 40 million parameters on two cores, unless said otherwise."""

    fixed: float = 0.010
    single: float = 0.001
    token: float = 0.0004
    seen: float = 1.5e-7
    chunk: float = 0.004

    def of(self, work: Work) -> float:
        return (
            self.fixed
            + self.single * work.singles
            + self.chunk * work.chunks
            + self.token * work.tokens
            + self.seen * work.seen
        )


class Same:
    """A runner that always says the same token, at once."""

    def launch(self, plan: Plan) -> Known:
        outputs: Mapping[Lane, Output] = {it.lane: Output((Token(1),)) for it in plan if it.samples}
        return Known(outputs)


class Timed(Driver):
    """An engine on a clock of its own."""

    def __init__(
        self, target_s: float, costs: Costs | None = None, tokens_per_step: int = 512, max_running: int = 128
    ) -> None:
        limits = SchedulerLimits(tokens_per_step, max_running, max_waiting=1000, max_skips=50,
                                 target_inter_token_s=target_s)  # fmt: skip
        super().__init__(limits, KVCache(4000, 16), Same(), FakeResidency(8))
        self.costs = costs or Costs()
        self.now = 0.0
        self.came: dict[int, float] = {}
        self.tokens_at: defaultdict[int, list[float]] = defaultdict(list)
        self.prompt_tokens: list[int] = []  # of each step

    def ask(self, prompt_tokens: int, max_tokens: int, adapter: AdapterRef | None = None) -> Answer:
        number = len(self.answers)
        answer = self.add([number * 10_000 + index for index in range(prompt_tokens)], max_tokens, adapter)
        self.came[answer.id] = self.now
        return answer

    def step(self) -> Plan:
        before = {number: len(answer.tokens) for number, answer in self.answers.items() if answer.finish is None}
        plan = super().step()
        work = work_of(plan)
        seconds = self.costs.of(work)
        self.now += seconds
        self.engine.took(seconds)
        self.prompt_tokens.append(work.tokens)
        for number, count in before.items():
            self.tokens_at[number] += [self.now] * (len(self.answers[number].tokens) - count)
        return plan

    def decoding(self, count: int, max_tokens: int = 5000) -> list[Answer]:
        """So many, past their prompts and for a while."""
        answers = [self.ask(100, max_tokens) for _ in range(count)]
        for _ in range(40):
            self.step()
        assert all(answer.tokens for answer in answers)
        return answers

    def ttft(self, answer: Answer) -> float:
        return self.tokens_at[answer.id][0] - self.came[answer.id]

    def gaps(self, answers: list[Answer], since: float) -> list[float]:
        times = ([it for it in self.tokens_at[answer.id] if it >= since] for answer in answers)
        return sorted(later - earlier for it in times for earlier, later in zip(it, it[1:], strict=False))


def long_prompts_arriving(target_s: float, costs: Costs | None = None) -> tuple[float, float]:
    """The 99th percentile of eight neighbours' time between tokens, and the median time to the first token."""
    engine = Timed(target_s, costs)
    neighbours, start = engine.decoding(8), engine.now
    prompts: list[Answer] = []
    while engine.now < start + 24:
        if engine.now >= start + 8 * len(prompts):
            prompts.append(engine.ask(4096, 8))
        engine.step()
    while not all(it.tokens for it in prompts):
        engine.step()
    gaps = engine.gaps(neighbours, start)
    return gaps[int(len(gaps) * 0.99)], statistics.median(map(engine.ttft, prompts))


def test_neighbours_of_long_prompts_wait_about_the_target_for_their_next_token() -> None:
    undisturbed, first_token = long_prompts_arriving(0.0)
    p99, later_first_token = long_prompts_arriving(0.05)
    assert undisturbed > 0.2 and p99 <= 0.06
    assert later_first_token <= 2 * first_token


def test_where_decoding_alone_takes_longer_than_the_target_prompts_have_as_much_time_as_it() -> None:
    engine = Timed(0.05, Costs(0.2, 0.02, 0.008, 3e-6, 0.08))
    neighbours, start = engine.decoding(8), engine.now
    prompt = engine.ask(4096, 8)
    while not prompt.tokens:
        engine.step()
    gaps = engine.gaps(neighbours, start)
    assert 0.7 < gaps[len(gaps) // 2] and gaps[int(len(gaps) * 0.99)] < 1.0  # 2.5 times 0.36 s


def test_a_short_prompt_does_not_wait_for_three_long_ones() -> None:
    engine = Timed(0.05)
    neighbours, start = engine.decoding(8), engine.now
    long = [engine.ask(4096, 8) for _ in range(3)]
    for _ in range(5):
        engine.step()
    short = engine.ask(100, 8)
    while not short.tokens:
        engine.step()
    assert not any(it.tokens for it in long)
    assert engine.ttft(short) < 0.4  # five steps with half of what prompts get in each
    while not all(it.tokens for it in long):
        engine.step()
    assert engine.gaps(neighbours, start)[-1] < 0.16  # four prompts beside eight: three times the target
    # the first has a quarter at least whoever comes, and is through first
    assert engine.ttft(long[0]) == min(map(engine.ttft, long))


def test_a_long_prompt_ends_however_many_short_ones_keep_coming() -> None:
    engine = Timed(0.05)
    engine.decoding(8)
    long = engine.ask(4096, 1)
    steps = 0
    while not long.tokens:
        engine.ask(60, 1)  # in every step one more
        engine.step()
        steps += 1
        assert steps < 1000


@pytest.mark.parametrize(("count", "slower"), always([(16, 1.06), (32, 1.05), (64, 1.03)], (32, 1.05)))
def test_what_comes_all_at_once_is_hardly_slower(count: int, slower: float) -> None:
    ends, firsts = [], []
    for target_s in (0.0, 0.05):
        engine = Timed(target_s)
        engine.decoding(1, max_tokens=1)  # something is known
        answers, start = [engine.ask(64 + 192 * number // count, 64) for number in range(count)], engine.now
        while not engine.is_done:
            engine.step()
        ends.append(engine.now - start)
        firsts.append(statistics.median(map(engine.ttft, answers)))
    assert ends[1] <= slower * ends[0]
    assert firsts[1] <= 1.02 * firsts[0]


def beside_a_flood(prompt_tokens: int, max_tokens: int) -> tuple[float, float]:
    """Somebody asks through an adapter of its own every second and a half, while the base has 60 requests under way all
    the time (none: 0 tokens). The 90th percentile of its time to the first token, and the median time between two."""
    engine = Timed(0.05, max_running=16)
    ref = engine.register(AdapterRef("calm", "calm", "lora"))
    engine.decoding(1, max_tokens=1)
    asked: list[Answer] = []
    flood: list[Answer] = []
    start = engine.now
    while len(asked) < 40:
        if engine.now >= start + 1.5 * len(asked):
            asked.append(engine.ask(128, 32, ref))
        flood = [it for it in flood if it.finish is None]
        while prompt_tokens and len(flood) < 60:
            flood.append(engine.ask(prompt_tokens, max_tokens))
        engine.step()
        engine.now += 0.001 * (not prompt_tokens)
    firsts = sorted(engine.ttft(it) for it in asked[:-2])
    return firsts[int(len(firsts) * 0.9)], statistics.median(engine.gaps(asked, start))


@pytest.mark.parametrize(("prompt_tokens", "max_tokens"), always([(64, 400), (1500, 4), (128, 1)], (1500, 4)))
def test_whatever_one_adapter_is_sent_another_one_is_hardly_slower(prompt_tokens: int, max_tokens: int) -> None:
    """A flood of long answers, of long prompts, of short ones."""
    first, gap = beside_a_flood(0, 0)
    first_beside, gap_beside = beside_a_flood(prompt_tokens, max_tokens)
    # a step is stretched, and has a token of each of the flood's prompts in it
    assert gap_beside <= 5 * gap
    assert first_beside <= first + 2 * 0.231  # two whole steps of 512 tokens


def test_requests_whose_adapters_are_not_there_do_not_make_prompts_many() -> None:
    engine = Timed(0.05)
    neighbours, start = engine.decoding(8), engine.now
    ref = engine.register(AdapterRef("absent", "absent", "lora"))
    engine.residency.acquire = lambda ref: Wait.LOADING  # type: ignore[method-assign]
    for number in range(20):
        engine.add([number], 1, ref)
    engine.step()
    prompt = engine.ask(2000, 1)
    while not prompt.tokens:
        engine.step()
    assert engine.gaps(neighbours, start)[-1] < 0.07


LOAD = Load(decodes=8, prompts=1, due=1, position=0.0)


def taught(target_s: float) -> StepBudget:
    """Eight decodes take 20 ms, a chunk of a prompt 4 ms, and each of its tokens 0.5 ms."""
    budget = StepBudget(512, target_s)
    for number in range(100):
        budget.took(Work(8, 0, 0, 0), 0.02)
        budget.took(Work(8, 1, number, 0), 0.024 + 0.0005 * number)
    return budget


def test_a_step_has_what_makes_it_as_long_as_the_target() -> None:
    assert taught(0.05).tokens(LOAD) == pytest.approx(8 + 52, abs=4)
    assert taught(0.01).tokens(LOAD) == pytest.approx(8 + 52, abs=4)  # 2.5 times as long as without prompts


def test_without_times_or_a_target_or_others_a_step_has_its_whole_budget() -> None:
    assert StepBudget(512, 0.05).tokens(LOAD) == taught(0.0).tokens(LOAD) == 512
    assert taught(0.05).tokens(LOAD._replace(decodes=0)) == taught(0.05).tokens(LOAD._replace(prompts=0)) == 512


def test_where_many_prompts_stand_beside_few_that_decode_the_target_grows_with_them() -> None:
    budget = taught(0.05)
    of = {prompts: budget.tokens(LOAD._replace(prompts=prompts, due=prompts)) for prompts in (1, 2, 3, 8, 100)}
    assert of[1] < of[2] < of[3] < of[8] <= of[100] == 512


def test_prompts_of_adapters_that_were_served_more_than_others_only_stretch_a_step() -> None:
    budget = taught(0.1)
    assert budget.tokens(LOAD) > 64
    ahead = budget.tokens(LOAD._replace(prompts=100, due=0))
    assert ahead == pytest.approx(8 + 32, abs=4)  # 16 ms for what is in four chunks, which cost 16 ms themselves


def test_costs_are_learned_and_followed() -> None:
    times = StepTimes()
    for factor in (1.0, 3.0, 0.5):
        costs = Costs(0.01 * factor, 0.001 * factor, 0.0004 * factor, 1.5e-7 * factor, 0.0)
        for number in range(200):
            times.learn(Work(8, 0, 0, 0), costs.of(Work(8, 0, 0, 0)))
            tokens = 20 + number % 50
            work = Work(8, 1, tokens, tokens * (number % 32) * 128)
            times.learn(work, costs.of(work))
        assert times.of_decodes(8) == pytest.approx(costs.of(Work(8, 0, 0, 0)), rel=0.01)
        for position in (0, 2000, 4000):
            token = costs.of(Work(0, 0, 1, position))
            token -= costs.fixed
            assert times.of_prompt_token(position) == pytest.approx(token, rel=0.1)


def test_one_step_that_somebody_else_held_up_changes_little() -> None:
    times = StepTimes()
    for _ in range(50):
        times.learn(Work(8, 0, 0, 0), 0.02)
        times.learn(Work(8, 1, 64, 0), 0.05)
    times.learn(Work(8, 0, 0, 0), 5.0)
    times.learn(Work(8, 1, 64, 0), 5.0)
    assert times.of_decodes(8) < 0.03 and times.of_prompt_token(0) < 0.001
