"""Drives an Engine as its loop does: messages go in with the next step, events come out of it."""

from collections.abc import Sequence

from adapters_store.parts import AdapterPackage
from adapters_store.ref import AdapterRef
from server.engine.checks import Checker
from server.engine.core import Engine
from server.engine.fake_masks import FakeMasks
from server.engine.fake_runner import FakeChecker
from server.engine.kv_cache import KVCache
from server.engine.masks import Masks
from server.engine.messages import (
    Abort,
    AdapterChecked,
    AdapterGone,
    AdapterMoved,
    AddAdapter,
    AddRequest,
    CheckAdapter,
    RemoveAdapter,
    ToEngine,
    TokenEvent,
)
from server.engine.plan import Pending, Plan, Runner
from server.engine.request import (
    Fault,
    FinishReason,
    Group,
    LaneSpec,
    Logprobs,
    OfPrompt,
    Request,
    Sampling,
    ToldOfPrompt,
)
from server.engine.residency import Residency
from server.engine.scheduler import SchedulerLimits

GREEDY = Sampling(temperature=0.0)


class Answer:
    """What was asked, and what has come of it so far. `tokens` are those generated."""

    def __init__(self, message: AddRequest) -> None:
        self.id, self.max_tokens = message.request_id, message.max_tokens
        self.prompt, self.adapter = message.lanes[0].prompt, message.lanes[0].adapter
        self.stop_token_ids = message.stop_token_ids
        self.sampling, self.of_prompt, self.grammar = message.sampling, message.of_prompt, message.grammar
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs | None] = []  # of each
        self.told: ToldOfPrompt | None = None
        self.finish: FinishReason | None = None
        self.error: str | None = None
        self.fault: Fault | None = None
        self.num_cached_tokens = 0

    def take(self, event: TokenEvent) -> None:
        assert self.finish is None, "an event after the end"
        if event.of_prompt is not None:
            assert self.told is None and not self.tokens, "told twice, or later than with the first event"
            self.told = event.of_prompt
        if event.token is not None:
            self.tokens.append(event.token.id)
            self.logprobs.append(event.token.logprobs)
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        self.finish, self.error, self.fault = event.finish, event.error, event.fault


class Watched:
    """A runner, and the plan that it was given last."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.plan: Plan = ()

    def launch(self, plan: Plan) -> Pending:
        self.plan = plan
        return self._runner.launch(plan)


class Driver:
    def __init__(
        self,
        limits: SchedulerLimits,
        kv_cache: KVCache,
        runner: Runner,
        residency: Residency,
        checker: Checker | None = None,
        masks: Masks | None = None,
    ) -> None:
        self.kv_cache, self.residency = kv_cache, residency
        self._watched = Watched(runner)
        self.engine = Engine(limits, kv_cache, self._watched, residency, checker or FakeChecker(),
                             masks or FakeMasks())  # fmt: skip
        self.scheduler = self.engine.scheduler
        self.now = 0.0  # what steps are told
        self.answers: dict[int, Answer] = {}
        self.gone: list[AdapterGone] = []
        self.moved: list[AdapterMoved] = []
        self.checked: dict[int, AdapterChecked] = {}  # answers to checks, by their numbers
        self._num_checks = 0
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
        weight: float = 1.0,
        priority: int = 0,
        salt: str = "",
        of_prompt: OfPrompt | None = None,
        grammar: str | None = None,
    ) -> Answer:
        """`beside`: lanes behind the first."""
        number = len(self.answers)
        lanes = [LaneSpec(list(prompt), adapter, salt), *beside]
        group = number if group is None else group
        message = AddRequest(number, group, lanes, max_tokens, sampling, stop_token_ids, weight, priority, of_prompt,
                             grammar)  # fmt: skip
        self._outbox.append(message)
        self.answers[number] = Answer(message)
        return self.answers[number]

    def abort(self, answer: Answer) -> None:
        self._outbox.append(Abort([answer.id]))

    def register(self, ref: AdapterRef, package: AdapterPackage | None = None, pinned: bool = False) -> AdapterRef:
        package = package or AdapterPackage("lora", ref.revision, (), ())
        self._outbox.append(AddAdapter(ref, package, pinned=pinned))
        return ref

    def remove(self, ref: AdapterRef) -> None:
        self._outbox.append(RemoveAdapter(ref))

    def ask_for_check(self, ref: AdapterRef, num_tokens: int = 10) -> int:
        """Returns the check's number."""
        self._num_checks += 1
        self._outbox.append(CheckAdapter(self._num_checks, ref, num_tokens))
        return self._num_checks

    # -- steps ---

    def step(self) -> Plan:
        """Returns what was computed."""
        self._watched.plan = ()
        outbox, self._outbox = self._outbox, []
        for event in self.engine.step(outbox, self.now):
            match event:
                case TokenEvent(request_id=request_id):
                    self.answers[request_id].take(event)
                case AdapterGone():
                    self.gone.append(event)
                case AdapterMoved():
                    self.moved.append(event)
                case AdapterChecked():
                    assert event.check_id not in self.checked
                    self.checked[event.check_id] = event
        self.engine.check()
        return self._watched.plan

    def request(self, answer: Answer) -> Request | None:
        """The engine's own view of it; None before it was delivered, and once it has ended."""
        return self.scheduler.request(answer.id)

    @property
    def is_done(self) -> bool:
        return not self._outbox and not self.scheduler.has_requests
