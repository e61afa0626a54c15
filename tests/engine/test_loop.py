"""The engine as it is served: how long it waits for messages, and when the front hears of it. No time passes here."""

from types import SimpleNamespace

import pytest

from server.engine import loop as loop_module
from server.engine.core import Pace
from server.engine.loop import MAX_SILENCE_S, Loop
from server.engine.messages import Event, Shutdown, Stats, StepDone, ToEngine, ToFront, TokenEvent
from server.engine.request import Token

EVENT = TokenEvent(1, Token(5))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(loop_module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


class ScriptedEngine:
    """Steps that take so long, say so much and leave such a pace."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.pace = Pace.BUSY
        self.is_shut_down = False
        self.script: list[tuple[Pace, list[Event], float]] = []
        self.heard: list[list[ToEngine]] = []
        self.told: list[float] = []
        self.num_checks = 0

    def step(self, messages: list[ToEngine], now: float) -> list[Event]:
        assert now == self.clock.now
        self.heard.append(messages)
        self.is_shut_down = Shutdown() in messages
        self.pace, events, seconds = self.script.pop(0)
        self.clock.now += seconds
        return events

    def took(self, seconds: float) -> None:
        self.told.append(seconds)

    def check(self) -> None:
        self.num_checks += 1

    def stats(self) -> Stats:
        return Stats(running=3, steps=len(self.heard))


class Served:
    """A loop, and what passes at its two ends."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.engine = clock, ScriptedEngine(clock)
        self.published: list[ToFront] = []
        self.waits: list[int] = []
        self.arriving: list[ToEngine] = []
        self.waited_s = 0.0
        self.loop = Loop(self.engine, self, self.published.append)  # type: ignore[arg-type]

    def receive_all(self, timeout_ms: int) -> list[ToEngine]:
        self.waits.append(timeout_ms)
        self.clock.now += self.waited_s
        arrived, self.arriving = self.arriving, []
        return arrived

    def turn(self, pace: Pace, events: list[Event] | None = None, seconds: float = 0.0) -> list[ToFront]:
        """Make one; what was published."""
        self.engine.script.append((pace, events or [], seconds))
        self.published.clear()
        self.loop.turn()
        return list(self.published)


@pytest.fixture
def served(clock: Clock) -> Served:
    return Served(clock)


def test_a_step_is_made_at_once_soon_or_when_a_message_comes(served: Served) -> None:
    for pace in (Pace.LOADING, Pace.IDLE, Pace.BUSY, Pace.BUSY):
        served.turn(pace)
    busy, loading, idle, again = served.waits
    assert (busy, loading, idle, again) == (0, 5, 500, 0)
    assert idle / 1000 < MAX_SILENCE_S  # an idle engine says that it is alive no less often than a busy one


def test_what_has_come_is_the_steps(served: Served) -> None:
    served.arriving = [Shutdown()]
    served.turn(Pace.BUSY)
    served.turn(Pace.BUSY)
    assert served.engine.heard == [[Shutdown()], []]


def test_events_are_published_with_the_numbers_as_of_after_the_step(served: Served) -> None:
    assert served.turn(Pace.BUSY, [EVENT, EVENT]) == [StepDone([EVENT, EVENT], Stats(running=3, steps=1))]


def test_a_step_of_a_busy_engine_that_has_no_events_is_not_worth_a_message(served: Served) -> None:
    assert served.turn(Pace.BUSY) == []


@pytest.mark.parametrize("pace", [Pace.IDLE, Pace.LOADING])
def test_an_engine_that_waits_says_so_in_every_turn(served: Served, pace: Pace) -> None:
    for turn in (1, 2, 3):
        assert served.turn(pace) == [StepDone([], Stats(running=3, steps=turn))]


def test_a_busy_engine_is_never_silent_for_long(served: Served, clock: Clock) -> None:
    assert served.turn(Pace.BUSY, seconds=MAX_SILENCE_S) == []
    assert len(served.turn(Pace.BUSY, seconds=0.25)) == 1
    assert served.turn(Pace.BUSY, seconds=MAX_SILENCE_S) == []  # counted from when it last spoke
    assert len(served.turn(Pace.BUSY, [EVENT], seconds=0.25)) == 1
    assert served.turn(Pace.BUSY, seconds=0.75) == []
    assert served.turn(Pace.BUSY, seconds=0.25) == []


def test_the_longest_step_is_told_and_waiting_is_no_part_of_it(served: Served) -> None:
    served.waited_s = 50.0
    for seconds, longest in ((0.5, 0.5), (0.25, 0.5), (2.0, 2.0)):
        (told,) = served.turn(Pace.IDLE, seconds=seconds)
        assert isinstance(told, StepDone) and told.stats.longest_step_s == longest


def test_every_invariant_is_proved_when_it_falls_idle_and_then_no_more(served: Served) -> None:
    checks = []
    for pace in (Pace.BUSY, Pace.LOADING, Pace.IDLE, Pace.IDLE, Pace.BUSY, Pace.IDLE):
        served.turn(pace)
        checks.append(served.engine.num_checks)
    assert checks == [0, 0, 1, 1, 1, 2]


def test_it_runs_until_a_message_ends_it(served: Served) -> None:
    served.engine.script = [(Pace.BUSY, [], 0.0)] * 5
    served.arriving = [Shutdown()]
    served.loop.run(lambda: True)
    assert len(served.engine.heard) == 1


def test_it_runs_while_it_may_and_asks_before_each_step(served: Served) -> None:
    served.engine.script = [(Pace.BUSY, [], 0.0)] * 5
    answers = [True, True, True, False]
    served.loop.run(lambda: answers.pop(0))
    assert len(served.engine.heard) == 3 and answers == []
