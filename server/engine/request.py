"""One request as the engine sees it, and the lanes that it owns."""

import enum
from array import array
from collections.abc import Sequence
from typing import Literal

import msgspec

from adapters_store.ref import AdapterRef

Group = int  # the requests of one HTTP request, by the id of its first
Slot = int  # adapter slot: a place for one adapter on the device
BASE_SLOT: Slot = 0
LEAST_WEIGHT, MOST_WEIGHT = 0.001, 1000.0  # of a group: turns of one are counted in floating point beside the others'


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to choose the next token. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off.

    `presence` and `frequency` (0 is off) are taken from the logits of generated tokens, `repetition` (1 is off) divides
    those of all tokens; `bias` is added to logits, by token id, before that. No stop token is chosen before
    `min_tokens` are generated. With `num_logprobs` it is said of each token how probable it was, and of so many of the
    most probable ones, as the model has it: before bias, penalties and temperature.

    The n-th token of a request depends on `seed`, n and the logits alone, not on what else was in the batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: dict[int, float] = {}
    min_tokens: int = 0
    num_logprobs: int | None = None


Pooling = Literal["mean", "last"]  # of the last hidden states of all tokens, or that of the last token


class OfPrompt(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is asked of the prompt itself: log-probabilities of its tokens and of so many of the most probable ones in
    the place of each, or its hidden states pooled. Of a request with several lanes, the first one's prompt."""

    num_logprobs: int | None = None
    pooling: Pooling | None = None

    @property
    def needs_all_tokens(self) -> bool:
        """Every token of the prompt must be computed, also where the prefix cache knows its keys."""
        return self.num_logprobs is not None or self.pooling == "mean"

    @property
    def asks_for_nothing(self) -> bool:
        return self.num_logprobs is None and self.pooling is None


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of probabilities in one place: of the token that stands there, which is the `rank`-th most
    probable (from 1), and of the most probable ones, best first."""

    chosen: float
    rank: int
    ids: list[int] = []
    top: list[float] = []


class Token(msgspec.Struct, frozen=True, array_like=True):
    """A generated token, and what is said of it. The engine needs its id; the rest it hands from runner to client."""

    id: int
    logprobs: Logprobs | None = None


class ToldOfPrompt(msgspec.Struct, frozen=True, array_like=True):
    """What was asked of the prompt. logprobs: of its tokens from the second on. vector: [hidden size] float32,
    little-endian, as the model has it."""

    logprobs: list[Logprobs] | None = None
    vector: bytes | None = None


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class Fault(enum.StrEnum):
    """What is the matter with an adapter that a request named, or with the request itself."""

    UNAVAILABLE = "unavailable"  # it could not be brought to the device; a later request may find it there
    QUARANTINED = "quarantined"  # it will not be served until it is registered again
    GRAMMAR = "grammar"  # not of its adapter: what it wants its tokens to follow became too much


class Tier(enum.StrEnum):
    """Where an adapter's weights are (server/weights/states.py has what leads from one to another)."""

    ABSENT = "absent"  # in its files only
    LOADING = "loading"
    HOST = "host"  # in the host cache
    RESIDENT = "resident"  # on the device
    QUARANTINED = "quarantined"


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class LaneSpec(msgspec.Struct, frozen=True):
    """What a lane starts from: its prompt, and the adapter that its tokens go through (None: the base).

    Lanes find each other's prefixes in the KV cache under the same `salt` only. A prefix hit shows in the time that an
    answer takes: with a salt of one's own, nobody else can tell by it what one has asked.
    """

    prompt: list[int]
    adapter: AdapterRef | None = None
    salt: str = ""


class Lane:
    """A sequence of tokens through one adapter, and how far the model has come with it.

    There is no prefill state and no decode state: `num_computed_tokens` chases `len(tokens)`, and a token is sampled
    whenever it catches up. Where steps overlap it may be one ahead: the last token is still only on the device.

        tokens        [ prompt ............ | generated ... ]
        in KV cache   [ num_computed_tokens ......... |     ]     <- blocks in block_table
    """

    def __init__(self, request: "Request", spec: LaneSpec) -> None:
        assert spec.prompt
        self.request = request
        self.adapter = spec.adapter
        self.salt = spec.salt
        self.tokens = list(spec.prompt)
        self.prompt_len = len(spec.prompt)
        self.num_computed_tokens = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []  # of the leading full blocks, as far as they were needed
        self.num_charged_tokens = 0  # of the prompt, that its adapter was charged for (token_counters.py)
        self.num_committed_blocks = 0  # leading blocks whose content the prefix cache knows
        self.slot: Slot = BASE_SLOT  # while running
        # the runner's own, which nobody else looks into: what it must remember from one chunk of a prompt to the next.
        # It begins anew with a chunk that starts at 0: what was computed before a preemption does not count
        self.carried: object = None
        self._history = array("i")

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.tokens) + self.request.num_awaited - self.num_computed_tokens

    @property
    def history(self) -> "array[int]":
        """Its tokens in one piece of memory, for those who copy all of them in every step. They only ever grow."""
        self._history.extend(self.tokens[len(self._history) :])
        return self._history

    @property
    def max_len(self) -> int:
        """Tokens of KV cache that it can come to need: the last sampled token is never computed."""
        return self.prompt_len + max(1, self.request.max_tokens) - 1


class Request:
    """What a client is given one answer to: lanes that wait, run and end together.

    Most requests have one lane. Several differ in prompt or adapter and continue alike: the first one speaks, and what
    is sampled from it becomes the next token of all. max_tokens 0: it ends when its prompts are computed.
    """

    def __init__(
        self,
        request_id: int,
        lanes: Sequence[LaneSpec],
        max_tokens: int,
        sampling: Sampling,
        stop_token_ids: frozenset[int] = frozenset(),
        group: Group | None = None,
        weight: float = 1.0,
        priority: int = 0,
        of_prompt: OfPrompt | None = None,
        arrived: float = 0.0,
        grammar: str | None = None,
    ) -> None:
        """`group` None: the request is alone in its own. `weight` and `priority` are its group's (queue.py). `arrived`:
        seconds, of the clock that steps are told of. `grammar`: what its tokens must spell (masks.py)."""
        assert lanes and max_tokens >= 0 and weight > 0
        self.id = request_id
        self.group = request_id if group is None else group
        self.weight, self.priority = weight, priority
        self.max_tokens = max_tokens
        self.sampling = sampling
        self.stop_token_ids = stop_token_ids
        self.of_prompt = None if of_prompt is None or of_prompt.asks_for_nothing else of_prompt
        self.told_early: ToldOfPrompt | None = None  # of the prompt, before the first token could be chosen
        self.grammar = grammar
        self.lanes = tuple(Lane(self, spec) for spec in lanes)
        self.first = self.lanes[0]  # the one that speaks
        adapter = self.first.adapter
        self.account = "" if adapter is None else adapter.name  # whose fair share it counts to
        self.status = Status.WAITING
        self.num_cached_tokens = 0  # prompt tokens of the first lane found in the prefix cache when first admitted
        self.was_admitted = False  # has run before, if only to be preempted
        self.arrived, self.queued_s = arrived, 0.0  # when it came, and how long it waited until it first ran
        self.num_passes = 0  # times that others were let pass while it waited for KV blocks
        self.num_outstanding = 0  # launched steps that come to its end and whose outputs are not known
        self.goes_ahead = False  # steps overlap: it goes on with what a launched one chooses, before that is known

    @property
    def adapters(self) -> list[AdapterRef]:
        """Of its lanes, the base left out."""
        return [lane.adapter for lane in self.lanes if lane.adapter is not None]

    @property
    def num_generated(self) -> int:
        return len(self.first.tokens) - self.first.prompt_len

    @property
    def num_awaited(self) -> int:
        """Tokens that follow those of each lane and are known to the device only. None beyond its last; and none of one
        that is constrained, whose next mask follows from what it is."""
        if not self.num_outstanding or not self.goes_ahead or self.grammar is not None:
            return 0
        return max(0, min(self.num_outstanding, self.max_tokens - 1 - self.num_generated))

    @property
    def is_constrained(self) -> bool:
        """A grammar says which tokens may come."""
        return self.grammar is not None and self.max_tokens > 0

    @property
    def untold(self) -> OfPrompt | None:
        """What it asked of its prompt, until that is told: with the first token, or with the end."""
        if self.of_prompt is None or self.told_early is not None or self.num_generated or self.num_outstanding:
            return None
        return self.of_prompt

    @property
    def num_uncomputed_tokens(self) -> int:
        count = 0
        for lane in self.lanes:  # a loop: this is asked several times a request in every step
            count += len(lane.tokens) - lane.num_computed_tokens
        return count + len(self.lanes) * self.num_awaited if self.num_outstanding else count

    @property
    def is_in_prompt(self) -> bool:
        """It has more to compute than each lane's last token: its prompts, or what was computed before it gave way."""
        return self.num_uncomputed_tokens > len(self.lanes)

    def divide(self, count: int) -> list[tuple[Lane, int]]:
        """At most `count` tokens among its lanes, in order.

        Lanes come to their ends in the same step: where the tokens do not reach that far, each keeps its last one.
        """
        if len(self.lanes) == 1:
            return [(self.first, min(count, self.num_uncomputed_tokens))]
        if count >= self.num_uncomputed_tokens:
            return [(lane, lane.num_uncomputed_tokens) for lane in self.lanes]
        chunks: list[tuple[Lane, int]] = []
        for lane in self.lanes:
            own = min(count, lane.num_uncomputed_tokens - 1)
            if own > 0:
                chunks.append((lane, own))
                count -= own
        return chunks

    def append(self, token: int) -> FinishReason | None:
        """The next token of all lanes; returns why the request ends with it, if it does."""
        for lane in self.lanes:
            lane.tokens.append(token)
        if token in self.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(lane.tokens) - lane.prompt_len >= self.max_tokens else None
