"""From what a request wants to pieces of text: what all routes that generate share."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from server.api.generating.choice import Choice, Piece, TokenTold
from server.api.protocol.wanted import Wanted
from server.api.service import Admission, Service
from server.api.texts.decoding import StopStrings
from server.api.texts.speech import CallPiece, Speaker
from server.engine.client import Submission
from server.engine.request import Fault, OfPrompt, ToldOfPrompt
from server.errors import (
    AdapterUnavailable,
    ContextExceeded,
    GenerationFailed,
    GenerationTimeout,
    GrammarFailed,
    HeddleError,
    InvalidRequest,
    QuarantinedMeanwhile,
)
from server.lifecycle.leases import Lease

# log-probabilities of one request, of its prompts as often as they are told and of its answers: tens of megabytes of
# JSON, and some hundred of what it is made of
MAX_TOLD_OF_PROMPTS = 250_000
MAX_TOLD_OF_ANSWERS = 1_000_000


@dataclass
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def body(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


@dataclass
class Call:
    """A call of a tool. `arguments`: JSON text."""

    name: str
    arguments: str = ""


@dataclass
class Completed:
    """A completion when it has ended. In a conversation its text is `content`, `reasoning` and `calls`."""

    text: str = ""
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[TokenTold] = field(default_factory=list)
    finish: str = ""
    stop: str | int | None = None
    of_prompt: ToldOfPrompt | None = None

    def take(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish, self.stop = piece.finish or self.finish, piece.stop
        self.of_prompt = self.of_prompt or piece.of_prompt
        self.content += piece.said.content
        self.reasoning += piece.said.reasoning
        for it in piece.said.calls:
            self._take_call(it)

    def _take_call(self, it: CallPiece) -> None:
        if it.name is not None:
            self.calls.append(Call(it.name))
        self.calls[it.index].arguments += it.arguments

    @property
    def mean_logprob(self) -> float:
        """Of its tokens; the greater, the better it is."""
        return sum(it.logprobs.chosen for it in self.tokens) / max(1, len(self.tokens))


@dataclass
class Generation:
    """All completions of one HTTP request. Iterate over `pieces()`; `usage` is complete when it ends."""

    service: Service
    wanted: Wanted
    submissions: list[Submission]
    admission: Admission
    lease: Lease
    arrived: float  # of the monotonic clock, seconds: from then on its time runs
    speaker: Speaker | None = None  # of a conversation
    usage: Usage = field(default_factory=Usage)

    @property
    def prompts(self) -> list[list[int]]:
        return [it.prompt for it in self.submissions[:: self.wanted.per_prompt]]

    async def completed(self) -> list[Completed]:
        """All completions, by prompt and then by number."""
        completed = [Completed() for _ in self.submissions]
        async for piece in self.pieces():
            if piece is not None:
                completed[piece.index].take(piece)
        return completed

    async def pieces(self) -> AsyncGenerator[Piece | None]:
        """Pieces of all completions as they come, and None from time to time while nothing does: whoever waits for them
        may be told that all is well. Closing the iterator cancels what still runs."""
        self.usage.prompt_tokens = sum(map(len, self.prompts))
        counts = self.service.metrics.request(self.wanted.meant.label, self.arrived, self.usage.prompt_tokens)
        stream = self.service.client.submit(self.submissions)
        self.admission.end()  # from here on the client counts them
        finish = "cancelled"  # what becomes of the choices that do not end by themselves
        stops = StopStrings(self.wanted.stop_strings, self.wanted.keeps_stop)
        choices = {request_id: self._choice(index, stops) for index, request_id in enumerate(stream.request_ids)}
        timer = self._end_in_time(stream.end_with)
        try:
            self.lease.bind(stream.end_with)
            async for event in stream:
                if event is None:
                    yield None
                    continue
                if event.error is not None:
                    raise self._failure(event.error, event.fault)
                choice = choices[event.request_id]
                if event.token is not None:
                    counts.token(event.request_id, stream.heard_at)
                    self.usage.completion_tokens += 1
                if choice.index % self.wanted.per_prompt == 0:  # a prompt is counted once, not once a choice
                    self.usage.cached_tokens += event.num_cached_tokens
                piece = choice.push(event)
                self.usage.reasoning_tokens += piece.num_reasoning
                if piece.begins:
                    prompt = self.submissions[choice.index].prompt
                    counts.begun(len(prompt), event.num_cached_tokens, event.queued_s)
                if piece.finish is not None:
                    counts.ended(piece.finish)
                    stream.stop(event.request_id)
                    del choices[event.request_id]
                if piece.says_something:
                    yield piece
        except HeddleError:
            finish = "error"
            raise
        finally:
            stream.cancel()
            self.lease.end()
            if timer is not None:
                timer.cancel()
            counts.ended(finish, len(choices))
            counts.over()

    def _failure(self, error: str, fault: Fault | None) -> HeddleError:
        """What the client is told of a request that the engine has given up."""
        if fault is Fault.QUARANTINED:
            return QuarantinedMeanwhile(error)
        if fault is Fault.GRAMMAR:
            return GrammarFailed(error)
        if fault is Fault.UNAVAILABLE:
            if self.wanted.meant.ref is not None:
                self.service.lifecycle.suspect(self.wanted.meant.ref)
            return AdapterUnavailable(error)
        return GenerationFailed(error)

    def _choice(self, index: int, stops: StopStrings) -> Choice:
        it, speaker = self.wanted, self.speaker
        decoder = self.service.text.decoder(
            not it.keeps_special_tokens, speaker.kept_tokens if speaker else frozenset()
        )
        splitter = speaker.splitter() if speaker else None
        return Choice(index, decoder, stops, it.stop_token_ids, it.min_tokens, splitter)

    def _end_in_time(self, end: Callable[[HeddleError], None]) -> asyncio.TimerHandle | None:
        limit = self.wanted.timeout_s
        if limit is None:
            return None
        error = GenerationTimeout(f"the request had {limit:g} s (timeout), and they are over", param="timeout")
        left = self.arrived + limit - time.monotonic()
        return asyncio.get_running_loop().call_later(max(0.0, left), end, error)


def plan(
    service: Service,
    wanted: Wanted,
    prompts: Sequence[list[int]],
    admission: Admission,
    lease: Lease,
    arrived: float,
    speaker: Speaker | None = None,
    grammar: str | None = None,
) -> Generation:
    """Check sizes against the model and spread the completions of each prompt over requests. Raises InvalidRequest."""
    submissions: list[Submission] = []
    seed = random.getrandbits(63) if wanted.seed is None else wanted.seed
    for prompt in prompts:
        max_tokens = wanted.max_tokens_in(_room(service, wanted, prompt))
        wanted.check_least(max_tokens)
        for index in range(wanted.per_prompt):
            of_prompt = wanted.of_prompt if index == 0 else None
            it = _submission(service, wanted, prompt, max_tokens, seed + len(submissions), of_prompt, grammar)
            submissions.append(it)
    tokens, limit = sum(len(it.prompt) + it.max_tokens for it in submissions), service.max_request_tokens
    if tokens > limit:
        raise InvalidRequest(
            f"{len(submissions)} completions of up to {tokens:,} tokens in one request, prompts included; at most "
            f"{limit:,} are served",
            param="max_tokens",
        )
    _refuse_to_tell_too_much(wanted, submissions)
    return Generation(service, wanted, submissions, admission, lease, arrived, speaker)


def _refuse_to_tell_too_much(wanted: Wanted, submissions: Sequence[Submission]) -> None:
    """Raises InvalidRequest."""
    if wanted.of_prompt is not None and wanted.of_prompt.num_logprobs is not None:
        prompts = sum(len(it.prompt) for it in submissions) * wanted.times_prompt_is_told
        told = prompts * (1 + wanted.of_prompt.num_logprobs)
        if told > MAX_TOLD_OF_PROMPTS:
            raise InvalidRequest(
                f"{told:,} log-probabilities of prompts in one answer; at most {MAX_TOLD_OF_PROMPTS:,} are told",
                param="prompt_logprobs" if wanted.num_logprobs is None else "logprobs",
            )
    if wanted.num_logprobs is not None:
        told = sum(it.max_tokens for it in submissions) * (1 + wanted.num_logprobs)
        if told > MAX_TOLD_OF_ANSWERS:
            raise InvalidRequest(
                f"up to {told:,} log-probabilities in one answer; at most {MAX_TOLD_OF_ANSWERS:,} are told: ask for "
                "fewer tokens, or for fewer of the most probable ones",
                param="logprobs",
            )


def _room(service: Service, wanted: Wanted, prompt: list[int]) -> int:
    """Tokens that the context leaves behind the prompt. Raises InvalidRequest."""
    max_tokens, room = wanted.max_tokens, service.info.max_model_len - len(prompt)
    if not prompt:
        raise InvalidRequest("the prompt has no tokens", param="prompt")
    if room < (1 if max_tokens is None else max_tokens):
        told = f"the prompt has {len(prompt):,} tokens and max_tokens is {max_tokens}"
        if not max_tokens:
            told = f"the prompt is too long: it has {len(prompt):,} tokens and leaves no room for an answer"
        raise ContextExceeded(told, service.info.max_model_len, "max_tokens" if max_tokens else "messages")
    if max(prompt) >= service.info.vocab_size:  # a tokenizer may know more tokens than its model has embeddings
        raise InvalidRequest(
            f"the prompt has the token id {max(prompt)}; the model knows 0 to {service.info.vocab_size - 1}",
            param="prompt",
        )
    return room


def _submission(
    service: Service,
    wanted: Wanted,
    prompt: list[int],
    max_tokens: int,
    seed: int,
    of_prompt: OfPrompt | None,
    grammar: str | None,
) -> Submission:
    return Submission(
        prompt,
        max_tokens,
        wanted.sampling(seed, service.info.vocab_size),
        wanted.meant.ref,
        wanted.stop_tokens(service.info.stop_token_ids),
        weight=wanted.meant.manifest.weight,
        priority=wanted.engine_priority,
        salt=wanted.cache_salt,
        of_prompt=of_prompt,
        grammar=grammar,
    )
