"""From a parsed request to pieces of text: what completions and chat share."""

import random
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from server.api.protocol import GenerationBody
from server.api.service import Admission, Service
from server.api.text import Decoder, StopMatcher
from server.engine.client import Submission
from server.engine.messages import TokenEvent
from server.engine.request import FinishReason, Sampling
from server.errors import GenerationFailed, HeddleError, InvalidRequest
from server.lifecycle.leases import Lease
from server.lifecycle.models import Meant


@dataclass(frozen=True)
class Piece:
    """Some text of one choice; `finish` with the last."""

    index: int
    text: str
    finish: str | None = None


@dataclass
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def body(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class _Choice:
    """One completion as it grows."""

    def __init__(self, index: int, decoder: Decoder, stops: Sequence[str]) -> None:
        self.index = index
        self._decoder = decoder
        self._matcher = StopMatcher(stops)

    def push(self, event: TokenEvent) -> Piece:
        """The text that this token completes. A stop token has none."""
        ends_at_token = event.finish is FinishReason.STOP
        text = "" if ends_at_token or event.token is None else self._matcher.push(self._decoder.push(event.token.id))
        if self._matcher.matched:
            return Piece(self.index, text, FinishReason.STOP.value)
        if event.finish is not None:
            return Piece(self.index, text + self._matcher.flush(), event.finish.value)
        return Piece(self.index, text)


@dataclass(frozen=True)
class Wanted:
    """What a request asks for, completed by what its adapter's manifest says and by the route's default."""

    body: GenerationBody
    meant: Meant
    asked_tokens: int | None  # max_tokens, as the request or the route has it

    @property
    def stops(self) -> list[str]:
        return list(self.meant.manifest.stop) if self.body.stop is None else self.body.stops

    def max_tokens(self, room: int) -> int:
        """`room`: tokens that the context leaves. A manifest's number of tokens is a wish, and not asked of anybody."""
        if self.asked_tokens is not None:
            return self.asked_tokens
        return min(room, self.meant.manifest.sampling.max_tokens or room)

    def sampling(self, seed: int, vocab_size: int) -> Sampling:
        body, defaults = self.body, self.meant.manifest.sampling
        temperature = defaults.temperature if body.temperature is None else body.temperature
        top_p = defaults.top_p if body.top_p is None else body.top_p
        top_k = (defaults.top_k if body.top_k is None else body.top_k) or 0
        return Sampling(
            temperature=1.0 if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            top_k=min(max(top_k, 0), vocab_size),
            seed=seed & (2**63 - 1),
        )


@dataclass
class Generation:
    """All choices of one HTTP request. Iterate over `pieces()`; `usage` is complete when it ends."""

    service: Service
    wanted: Wanted
    submissions: list[Submission]
    choices_per_prompt: int
    admission: Admission
    lease: Lease
    usage: Usage = field(default_factory=Usage)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Pieces of all choices as they come. Closing the iterator cancels what still runs."""
        metrics, started, model = self.service.metrics, time.monotonic(), self.wanted.meant.label
        self.usage.prompt_tokens = sum(len(it.prompt) for it in self.submissions[:: self.choices_per_prompt])
        metrics.prompt_tokens.labels(model).inc(self.usage.prompt_tokens)
        stream = self.service.client.submit(self.submissions)
        self.admission.end()  # from here on the client counts them
        finish = "cancelled"  # what becomes of the choices that do not end by themselves
        choices = {
            request_id: _Choice(index, self.service.text.decoder(), self.wanted.stops)
            for index, request_id in enumerate(stream.request_ids)
        }
        try:
            self.lease.bind(stream.end_with)
            async for event in stream:
                if event.error is not None:
                    if self.wanted.meant.ref is not None:
                        self.service.lifecycle.suspect(self.wanted.meant.ref)
                    raise GenerationFailed(event.error)
                choice = choices[event.request_id]
                if self.usage.completion_tokens == 0:
                    metrics.time_to_first_token.labels(model).observe(time.monotonic() - started)
                self.usage.completion_tokens += 1
                if choice.index % self.choices_per_prompt == 0:  # a prompt is counted once, not once a choice
                    self.usage.cached_tokens += event.num_cached_tokens
                piece = choice.push(event)
                if piece.finish is not None:
                    metrics.requests.labels(model, piece.finish).inc()
                    stream.stop(event.request_id)
                    del choices[event.request_id]
                if piece.text or piece.finish:
                    yield piece
        except HeddleError:
            finish = "error"
            raise
        finally:
            stream.cancel()
            self.lease.end()
            metrics.requests.labels(model, finish).inc(len(choices))
            metrics.generated_tokens.labels(model).inc(self.usage.completion_tokens)
            metrics.duration.labels(model).observe(time.monotonic() - started)
            if not self.service.is_served(model):  # deleted meanwhile: its series must not come back
                metrics.forget_model(model)


def plan(service: Service, wanted: Wanted, prompts: list[list[int]], admission: Admission, lease: Lease) -> Generation:
    """Check sizes against the model and spread `n` choices of each prompt over requests."""
    body, max_tokens = wanted.body, wanted.asked_tokens
    submissions: list[Submission] = []
    seed = random.getrandbits(63) if body.seed is None else body.seed
    n = body.n or 1
    for prompt in prompts:
        room = service.info.max_model_len - len(prompt)
        if not prompt:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        if room < (max_tokens or 1):
            asked = (
                f" and max_tokens is {max_tokens}; together they exceed" if max_tokens else " and must be shorter than"
            )
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens{asked} the model's {service.info.max_model_len}",
                param="max_tokens" if max_tokens else "messages",
                code="context_length_exceeded",
            )
        if max(prompt) >= service.info.vocab_size:  # a tokenizer may know more tokens than its model has embeddings
            raise InvalidRequest(
                f"the prompt has the token id {max(prompt)}; the model knows 0 to {service.info.vocab_size - 1}",
                param="prompt",
            )
        for _ in range(n):
            sampling = wanted.sampling(seed + len(submissions), service.info.vocab_size)
            submissions.append(_submission(service, wanted, prompt, wanted.max_tokens(room), sampling))
    tokens, limit = sum(len(it.prompt) + it.max_tokens for it in submissions), service.max_request_tokens
    if tokens > limit:
        raise InvalidRequest(
            f"{len(submissions)} completions of up to {tokens:,} tokens in one request, prompts included; at most "
            f"{limit:,} are served",
            param="max_tokens",
        )
    return Generation(service, wanted, submissions, n, admission, lease)


def _submission(service: Service, wanted: Wanted, prompt: list[int], max_tokens: int, sampling: Sampling) -> Submission:
    manifest = wanted.meant.manifest
    return Submission(
        prompt, max_tokens, sampling, wanted.meant.ref, service.info.stop_token_ids,
        weight=manifest.weight, priority=manifest.priority, salt=wanted.body.cache_salt or "",
    )  # fmt: skip
