"""The contract between scheduler and runner: what a step computes, and what comes of it.

    plan -> runner.launch(plan) -> Pending -> outputs() -> {lane: Output}

A plan is a list of scheduled lanes. `launch` starts the work and need not wait for it; `outputs` does.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from server.engine.request import Lane, Request, Token


class Scheduled(NamedTuple):
    """In this step, compute `num_tokens` tokens of `lane`, from `start` on.

    `samples`: it comes to its end with them, and an output is wanted of what the model makes of the last one.
    """

    lane: Lane
    start: int
    num_tokens: int
    samples: bool


Plan = Sequence[Scheduled]


class Output(NamedTuple):
    """What a lane that samples gets from a step: tokens (more than one where some were guessed right), or an error.

    No tokens: the request wants none (max_tokens 0), only that its prompts be computed.
    """

    tokens: tuple[Token, ...] = ()
    error: str | None = None


class Pending(Protocol):
    """A step that was launched."""

    def outputs(self) -> Mapping[Lane, Output]:
        """Of every scheduled lane that samples. Waits until they are known; called once."""


class Runner(Protocol):
    """Computes steps on the device, in the order in which they are launched."""

    def launch(self, plan: Plan) -> Pending:
        """Start a step. `plan` holds at least one lane, none of them twice."""


class Draft:
    """A plan as it takes shape, and the tokens that are left of its budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.num_lanes = 0  # of the requests in it
        self.cut: list[Request] = []  # those that could compute more
        self._scheduled: dict[int, list[Scheduled]] = {}  # by request
        self._num_tokens: dict[int, int] = {}

    def add(self, request: Request, chunks: Sequence[tuple[Lane, int]]) -> None:
        num_tokens = 0
        for _, count in chunks:
            num_tokens += count
        is_whole = num_tokens == request.num_uncomputed_tokens
        self._scheduled[request.id] = [
            Scheduled(lane, lane.num_computed_tokens, count, is_whole and lane is request.first)
            for lane, count in chunks
        ]
        self._num_tokens[request.id] = num_tokens
        self.budget -= num_tokens
        self.num_lanes += len(request.lanes)
        if not is_whole:
            self.cut.append(request)

    def drop(self, request: Request) -> None:
        if request in self:
            self.budget += self._num_tokens.pop(request.id)
            self.num_lanes -= len(request.lanes)
            del self._scheduled[request.id]

    def num_tokens(self, request: Request) -> int:
        return self._num_tokens.get(request.id, 0)

    def __contains__(self, request: Request) -> bool:
        return request.id in self._scheduled

    @property
    def plan(self) -> list[Scheduled]:
        return [scheduled for chunks in self._scheduled.values() for scheduled in chunks]
