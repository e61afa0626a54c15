"""What a request wants of the engine, in no route's words: each route says what its body means in these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from server.api.texts.speech import ToolsWanted
from server.engine.request import OfPrompt, Sampling
from server.errors import InvalidRequest
from server.grammars.source import GrammarSource
from server.lifecycle.models import Meant

# a manifest's priority counts before a request's own, of which there are fewer than this
_PRIORITIES = 256
_SEEDS = 2**63 - 1
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Wanted:
    """None: as the adapter's manifest has it, else the server's default. `max_tokens` 0: nothing is generated.

    `best_of` completions of each prompt are made, and routes answer with the `n` best. `num_logprobs` and `of_prompt`
    as the engine has them; `timeout_s` in seconds; a lower `priority` is served earlier. `source`: what the content of
    each must spell; `tools`: what may be called instead.
    """

    meant: Meant
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stops: Sequence[str] | None = None
    stop_token_ids: frozenset[int] = frozenset()
    keeps_stop: bool = False
    keeps_special_tokens: bool = False
    min_tokens: int = 0
    ignores_eos: bool = False
    n: int = 1
    best_of: int = 1
    num_logprobs: int | None = None
    of_prompt: OfPrompt | None = None
    times_prompt_is_told: int = 1  # in each completion, where log-probabilities of it are asked for
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""
    source: GrammarSource | None = None
    tools: ToolsWanted | None = None

    @property
    def per_prompt(self) -> int:
        """Completions of each."""
        return max(self.n, self.best_of)

    def max_tokens_in(self, room: int) -> int:
        """`room`: tokens that the context leaves. A manifest's number of tokens is a wish, and not asked of anybody."""
        if self.max_tokens is not None:
            return self.max_tokens
        return min(room, self.meant.manifest.sampling.max_tokens or room)

    def check_least(self, max_tokens: int) -> None:
        """Raises InvalidRequest."""
        if self.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens:,}, and at most {max_tokens:,} are generated", param="min_tokens"
            )

    @property
    def stop_strings(self) -> Sequence[str]:
        return self.meant.manifest.stop if self.stops is None else self.stops

    def stop_tokens(self, of_model: frozenset[int]) -> frozenset[int]:
        return self.stop_token_ids if self.ignores_eos else self.stop_token_ids | of_model

    @property
    def engine_priority(self) -> int:
        """Higher is earlier there."""
        return self.meant.manifest.priority * _PRIORITIES - self.priority

    def sampling(self, seed: int, vocab_size: int) -> Sampling:
        it = self.meant.manifest.sampling
        return Sampling(
            temperature=_first(self.temperature, it.temperature, 1.0),
            top_p=_first(self.top_p, it.top_p, 1.0),
            top_k=min(max(_first(self.top_k, it.top_k, 0), 0), vocab_size),
            min_p=_first(self.min_p, it.min_p, 0.0),
            seed=seed & _SEEDS,
            presence=_first(self.presence_penalty, it.presence_penalty, 0.0),
            frequency=_first(self.frequency_penalty, it.frequency_penalty, 0.0),
            repetition=_first(self.repetition_penalty, it.repetition_penalty, 1.0),
            bias=dict(self.logit_bias),
            min_tokens=self.min_tokens,
            # which of several is best is told by how probable they are
            num_logprobs=0 if self.num_logprobs is None and self.best_of > self.n else self.num_logprobs,
        )


def _first(*values: Number | None) -> Number:
    return next(it for it in values if it is not None)
