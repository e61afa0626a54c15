"""The engine as it is served: messages come, steps are made, and the front hears of them."""

import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from server.engine.core import Engine, Pace
from server.engine.messages import Event, StepDone, ToEngine, ToFront

# how long the next step may wait for a message. An idle engine says that it is alive this often
_WAIT_MS = {Pace.BUSY: 0, Pace.AWAITING_MASKS: 1, Pace.LOADING: 5, Pace.IDLE: 500}
MAX_SILENCE_S = 1.0  # a busy one says so at least this often


class Inbox(Protocol):
    def receive_all(self, timeout_ms: int) -> list[ToEngine]:
        """What has come; waits at most so long for the first."""


class Loop:
    def __init__(self, engine: Engine, inbox: Inbox, publish: Callable[[ToFront], None]) -> None:
        self._engine, self._inbox, self._publish = engine, inbox, publish
        self._longest_step_s = 0.0
        self._last_said = time.monotonic()

    def run(self, may_go_on: Callable[[], bool]) -> None:
        """Until told to stop by a message, or by `may_go_on`, which is asked before each step."""
        while not self._engine.is_shut_down and may_go_on():
            self.turn()

    def turn(self) -> None:
        before = self._engine.pace
        messages = self._inbox.receive_all(_WAIT_MS[before])
        start = time.monotonic()
        events = self._engine.step(messages, start)
        seconds = time.monotonic() - start
        self._engine.took(seconds)
        self._longest_step_s = max(self._longest_step_s, seconds)
        if self._engine.pace is Pace.IDLE and before is not Pace.IDLE:
            self._engine.check()  # busy until now: prove that nothing leaked
        if events or self._engine.pace is not Pace.BUSY or self._is_silent():
            self._say(events)

    def _say(self, events: list[Event]) -> None:
        stats = msgspec.structs.replace(self._engine.stats(), longest_step_s=self._longest_step_s)
        self._publish(StepDone(events, stats))
        self._last_said = time.monotonic()

    def _is_silent(self) -> bool:
        """A long prefill has no events for many steps; a front that hears nothing would take us for dead."""
        return time.monotonic() - self._last_said > MAX_SILENCE_S
