"""The contract between scheduler and runner: what a step computes, and what comes of it.

    plan -> runner.launch(plan) -> Pending -> outputs() -> {lane: Output}

A plan is a list of scheduled lanes. `launch` starts the work and need not wait for it; `outputs` does.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

from server.engine.request import Lane, OfPrompt, Request, Token, ToldOfPrompt


class Scheduled(NamedTuple):
    """In this step, compute `num_tokens` tokens of `lane`, from `start` on.

    `samples`: it comes to its end with them, and an output is wanted of what the model makes of the last one. Where
    steps overlap, the last token may not be known: it is what the step before chose for the lane's request.
    """

    lane: Lane
    start: int
    num_tokens: int
    samples: bool

    @property
    def is_fed_back(self) -> bool:
        """Whether its last token is what the step before chooses."""
        return self.start + self.num_tokens > len(self.lane.tokens)

    @property
    def of_prompt(self) -> OfPrompt | None:
        """What is asked of the prompt that the tokens belong to, and not told yet."""
        request = self.lane.request
        if request.of_prompt is None or self.lane is not request.first:  # looked at for every lane of every step
            return None
        return request.untold

    @property
    def pools(self) -> bool:
        """Its hidden states are wanted, and no token."""
        of_prompt = self.of_prompt
        return of_prompt is not None and of_prompt.pooling is not None

    @property
    def chooses(self) -> bool:
        """A token is chosen with its last logits, whether or not the request wants one."""
        return self.samples and not self.pools

    @property
    def logit_positions(self) -> range:
        """Those of its tokens whose logits are wanted: the last one's where a token is chosen, and where
        log-probabilities of the prompt are asked for those of every token that another one of the prompt follows."""
        end, of_prompt = self.start + self.num_tokens, self.of_prompt
        if of_prompt is None:
            return range(end - self.samples, end)
        if of_prompt.num_logprobs is None:
            return range(end, end)
        return range(self.start, end if self.chooses else min(end, self.lane.prompt_len - 1))


Plan = Sequence[Scheduled]


class Output(NamedTuple):
    """What a lane that samples gets from a step: tokens (more than one where some were guessed right), or an error.

    No tokens: the request wants none (max_tokens 0), only that its prompts be computed. `of_prompt`: what it asked of
    the prompt, when that is computed to its end. `is_not_finite`: the error is that the model's output is no number.
    `is_late`: there was no mask to choose a token with, and its last tokens are to be computed once more.
    """

    tokens: tuple[Token, ...] = ()
    error: str | None = None
    of_prompt: ToldOfPrompt | None = None
    is_not_finite: bool = False
    is_late: bool = False


class Pending(Protocol):
    """A step that was launched."""

    def outputs(self) -> Mapping[Lane, Output]:
        """Of every scheduled lane that samples. Waits until they are known; called once."""


class Runner(Protocol):
    """Computes steps on the device, in the order in which they are launched."""

    def launch(self, plan: Plan) -> Pending:
        """Start a step. `plan` holds at least one lane, none of them twice."""


# tokens a step of prompts whose log-probabilities are asked for: the logits of each are held, which for a vocabulary of
# 150 thousand and three such tensors is 230 MB in bfloat16
LOGITS_PER_STEP = 256


class Draft:
    """A plan as it takes shape, and the tokens that are left of its budget."""

    def __init__(self, budget: int, logits: int = LOGITS_PER_STEP) -> None:
        """logits: how many tokens the requests together may compute that want the logits of all of them."""
        self.budget, self._logits = budget, logits
        self.num_lanes = 0  # of the requests in it
        self.cut: list[Request] = []  # those that could compute more
        self._decodes: list[Scheduled] = []  # those that were added together, until somebody looks for one
        self._scheduled: dict[int, Sequence[Scheduled]] = {}  # by request

    def divide(self, request: Request, count: int) -> list[tuple[Lane, int]]:
        """At most `count` tokens among its lanes (Request.divide), fewer where the logits of all are wanted. One for
        each lane there always is."""
        if request.of_prompt is not None and wants_all_logits(request):
            left = self._logits + self.num_tokens(request)
            count = min(count, max(left, len(request.lanes)))
        return request.divide(count)

    def add(self, request: Request, chunks: Sequence[tuple[Lane, int]]) -> None:
        num_tokens = 0
        for _, count in chunks:
            num_tokens += count
        is_whole = num_tokens == request.num_uncomputed_tokens
        self._scheduled[request.id] = [
            Scheduled(lane, lane.num_computed_tokens, count, is_whole and lane is request.first)
            for lane, count in chunks
        ]
        self.budget -= num_tokens
        if request.of_prompt is not None and wants_all_logits(request):
            self._logits -= num_tokens
        self.num_lanes += len(request.lanes)
        if not is_whole:
            self.cut.append(request)

    def add_decodes(self, scheduled: Sequence[Scheduled]) -> None:
        """Requests of one lane, each with its last token, of whose prompts nothing is asked. Into an empty plan: mostly
        they are all of it."""
        assert not self._scheduled
        self._decodes = list(scheduled)
        self.budget -= len(scheduled)
        self.num_lanes += len(scheduled)

    def drop(self, request: Request) -> None:
        if request in self:
            num_tokens = self.num_tokens(request)
            self.budget += num_tokens
            if request.of_prompt is not None and wants_all_logits(request):
                self._logits += num_tokens
            self.num_lanes -= len(request.lanes)
            del self._by_request()[request.id]

    def num_tokens(self, request: Request) -> int:
        return sum(it.num_tokens for it in self._by_request().get(request.id, ()))

    def __contains__(self, request: Request) -> bool:
        return request.id in self._by_request()

    @property
    def plan(self) -> list[Scheduled]:
        if not self._scheduled:
            return self._decodes
        return list(chain.from_iterable(self._by_request().values()))

    def _by_request(self) -> dict[int, Sequence[Scheduled]]:
        if self._decodes:
            decodes, self._decodes = self._decodes, []
            self._scheduled = {it.lane.request.id: (it,) for it in decodes} | self._scheduled
        return self._scheduled


def wants_all_logits(request: Request) -> bool:
    """Whether log-probabilities of its prompt are asked for, and not told yet."""
    untold = request.untold
    return untold is not None and untold.num_logprobs is not None
