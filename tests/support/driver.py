"""Drives an Engine as its loop does: messages go in with the next step, events come out of it."""

from collections.abc import Sequence

from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from server.engine.core import Engine
from server.engine.kv_cache import KVCache
from server.engine.messages import Abort, AddAdapter, AddRequest, RemoveAdapter, ToEngine, TokenEvent
from server.engine.plan import Pending, Plan, Runner
from server.engine.request import FinishReason, Group, LaneSpec, Request, Sampling
from server.engine.residency import Residency
from server.engine.scheduler import SchedulerLimits

GREEDY = Sampling(temperature=0.0)


class Answer:
    """What was asked, and what has come of it so far. `tokens` are those generated."""

    def __init__(self, message: AddRequest) -> None:
        self.id, self.max_tokens = message.request_id, message.max_tokens
        self.prompt, self.adapter = message.lanes[0].prompt, message.lanes[0].adapter
        self.stop_token_ids = message.stop_token_ids
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.error: str | None = None
        self.num_cached_tokens = 0

    def take(self, event: TokenEvent) -> None:
        assert self.finish is None, "an event after the end"
        if event.token is not None:
            self.tokens.append(event.token.id)
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        self.finish, self.error = event.finish, event.error


class Watched:
    """A runner, and the plan that it was given last."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.plan: Plan = ()

    def launch(self, plan: Plan) -> Pending:
        self.plan = plan
        return self._runner.launch(plan)


class Driver:
    def __init__(self, limits: SchedulerLimits, kv_cache: KVCache, runner: Runner, residency: Residency) -> None:
        self.kv_cache, self.residency = kv_cache, residency
        self._watched = Watched(runner)
        self.engine = Engine(limits, kv_cache, self._watched, residency)
        self.scheduler = self.engine.scheduler
        self.answers: dict[int, Answer] = {}
        self._outbox: list[ToEngine] = []

    # -- messages, delivered with the next step ---

    def add(
        self,
        prompt: Sequence[int],
        max_tokens: int = 4,
        adapter: AdapterRef | None = None,
        sampling: Sampling = GREEDY,
        stop_token_ids: frozenset[int] = frozenset(),
        group: Group | None = None,
        beside: Sequence[LaneSpec] = (),
    ) -> Answer:
        """`beside`: lanes behind the first."""
        number = len(self.answers)
        lanes = [LaneSpec(list(prompt), adapter), *beside]
        message = AddRequest(
            number, number if group is None else group, lanes, max_tokens, sampling, stop_token_ids
        )  # fmt: skip
        self._outbox.append(message)
        self.answers[number] = Answer(message)
        return self.answers[number]

    def abort(self, answer: Answer) -> None:
        self._outbox.append(Abort([answer.id]))

    def register(self, ref: AdapterRef, package: AdapterPackage | None = None) -> AdapterRef:
        self._outbox.append(AddAdapter(ref, package or AdapterPackage("lora", "", ref.revision, (), ())))
        return ref

    def remove(self, ref: AdapterRef) -> None:
        self._outbox.append(RemoveAdapter(ref))

    # -- steps ---

    def step(self) -> Plan:
        """Returns what was computed."""
        self._watched.plan = ()
        outbox, self._outbox = self._outbox, []
        for event in self.engine.step(outbox):
            self.answers[event.request_id].take(event)
        self.engine.check()
        return self._watched.plan

    def request(self, answer: Answer) -> Request | None:
        """The engine's own view of it; None before it was delivered, and once it has ended."""
        return self.scheduler.request(answer.id)

    @property
    def is_done(self) -> bool:
        return not self._outbox and not self.scheduler.has_requests
