"""What the routes that generate have in common. Fields are OpenAI's, and vLLM's where OpenAI has none."""

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainValidator,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from adapters_store.manifest import LEAST_REPETITION
from server.api.protocol.body import Body, Count, Finite, Label, Labels, Unserved, limits_of
from server.api.protocol.schema import NOT_TRUE, NOTHING, TOKEN_ID, at_most, given, limit, one_of
from server.api.protocol.structured import GrammarFields, ResponseFormat
from server.api.protocol.wanted import Wanted
from server.engine.request import OfPrompt
from server.errors import InvalidRequest
from server.grammars.source import GrammarSource
from server.lifecycle.models import Meant

MAX_BIASED = 1024  # token ids in logit_bias
MAX_STOP_TOKENS = 256
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Model = Annotated[str, Field(examples=[limit("base_name")])]
Temperature = Annotated[Finite, Field(ge=0, le=2)]
TopP = Annotated[Finite, Field(gt=0, le=1)]
TopK = Annotated[int, Field(ge=-1, lt=2**31)]


def _bias(value: Any, info: ValidationInfo) -> dict[int, float]:
    """By token id, as a number; checked by hand, since pydantic would collect an error for every entry."""
    vocab_size = limits_of(info).vocab_size
    if not isinstance(value, dict) or len(value) > MAX_BIASED:
        raise InvalidRequest(f"logit_bias must be an object of at most {MAX_BIASED} token ids", param="logit_bias")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        is_number = key.isascii() and key.isdecimal() and len(key) <= 10 and str(int(key)) == key  # one way to write it
        if not (is_number and int(key) < vocab_size):
            raise InvalidRequest(
                f"logit_bias has the key {key[:40]!r}; token ids are 0 to {vocab_size - 1}", param="logit_bias"
            )
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise InvalidRequest(f"logit_bias of token {key} must be a number from -100 to 100", param="logit_bias")
        biases[int(key)] = float(bias)
    return biases


def _stop_tokens(value: Any, info: ValidationInfo) -> list[int]:
    vocab_size = limits_of(info).vocab_size
    if not isinstance(value, list) or len(value) > MAX_STOP_TOKENS:
        raise InvalidRequest(
            f"stop_token_ids must be a list of at most {MAX_STOP_TOKENS} token ids", param="stop_token_ids"
        )
    for index, token in enumerate(value):
        if type(token) is not int or not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"stop_token_ids[{index}] is no token id; they are 0 to {vocab_size - 1}", param="stop_token_ids"
            )
    return value


def checked_stops(stop: Any, info: ValidationInfo, param: str = "stop") -> Any:
    """Counted before they are typed."""
    limits = limits_of(info)
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    if len(stops) > limits.max_stop:
        raise InvalidRequest(f"{len(stops)} stop strings; at most {limits.max_stop} are served", param=param)
    for text in stops:
        if isinstance(text, str) and not 0 < len(text) <= limits.max_stop_chars:
            problem = f"a stop string has {len(text):,} characters" if text else "a stop string may not be empty"
            raise InvalidRequest(f"{problem}; 1 to {limits.max_stop_chars:,} are served", param=param)
    return stop


def few_logprobs(count: int | None, info: ValidationInfo) -> int | None:
    """A number of most probable tokens that is served. Raises InvalidRequest."""
    most, param = limits_of(info).max_logprobs, info.field_name
    if count is not None and not 0 <= count <= most:
        raise InvalidRequest(f"{param} is {count}; 0 to {most} are served", param=param)
    return count


NumLogprobs = Annotated[
    int,
    Field(ge=-(2**63), lt=2**63),
    AfterValidator(few_logprobs),
    WithJsonSchema({"type": "integer", "minimum": 0, **at_most("max_logprobs")}),
]
_BIAS: JsonDict = {
    "type": "object",
    "description": "By token id; 0 to the vocabulary's last.",
    "maxProperties": MAX_BIASED,
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
_STOP_TOKENS: JsonDict = {"type": "array", "items": TOKEN_ID, "maxItems": MAX_STOP_TOKENS}
_STOP_STRING: JsonDict = {"type": "string", "minLength": 1, "maxLength": limit("max_stop_chars")}
STOP_STRINGS: JsonDict = {"type": "array", "items": _STOP_STRING, **at_most("max_stop", is_list=True)}
_STOP: JsonDict = {
    "anyOf": [
        _STOP_STRING,
        STOP_STRINGS,
        {"type": "null"},
    ]
}
IS_STREAMED: JsonDict = {"stream": {"const": True}}
STREAM_OPTIONS: JsonDict = {"anyOf": [given(**IS_STREAMED), {"properties": {"stream_options": {"type": "null"}}}]}
RULES: list[JsonValue] = [
    STREAM_OPTIONS,
    one_of(stream=NOT_TRUE, prompt_logprobs=NOTHING),
]


class StreamOptions(Body):
    WITHIN = "stream_options"
    UNSERVED: ClassVar[Unserved] = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}

    include_usage: bool = False


class SamplingBody(Labels, GrammarFields):
    """How to generate, whatever the prompt. Only requests of one `cache_salt` share what the cache holds of equal
    beginnings. `timeout`: seconds after which the request fails. `priority`: lower is served earlier, among requests of
    models whose manifests say the same."""

    UNSERVED: ClassVar[Unserved] = {
        "guided_decoding_backend": (), "guided_whitespace_pattern": (), "length_penalty": (1, 1.0),
        "use_beam_search": (False,),
        "truncate_prompt_tokens": (), "allowed_token_ids": ([],), "bad_words": ([],),
        "spaces_between_special_tokens": (True,), "logits_processors": ([],), "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,), "moderation": (), "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory",),
    }  # fmt: skip

    model: Model
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Finite, Field(ge=LEAST_REPETITION, le=10)] | None = None
    logit_bias: Annotated[dict[int, float], PlainValidator(_bias), WithJsonSchema(_BIAS)] | None = None
    seed: Seed | None = None
    stop: Annotated[str | Annotated[list[str], Field(fail_fast=True)] | None, WithJsonSchema(_STOP)] = None
    stop_token_ids: Annotated[list[int], PlainValidator(_stop_tokens), WithJsonSchema(_STOP_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    min_tokens: Annotated[
        Annotated[int, Field(ge=0, lt=2**64)] | None, Field(json_schema_extra=at_most("max_model_len"))
    ] = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    cache_salt: Label | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    timeout: Annotated[Finite, Field(gt=0, le=86_400)] | None = None

    _count_stops = field_validator("stop", mode="before")(checked_stops)

    def sampled(self, meant: Meant, max_tokens: int | None, num_logprobs: int | None) -> Wanted:
        """One completion of one prompt, as these fields have it."""
        return Wanted(
            meant,
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            stops=self.stops,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            keeps_stop=bool(self.include_stop_str_in_output),
            keeps_special_tokens=self.skip_special_tokens is False,
            min_tokens=self.min_tokens or 0,
            ignores_eos=bool(self.ignore_eos),
            num_logprobs=num_logprobs,
            priority=self.priority or 0,
            timeout_s=self.timeout,
            cache_salt=self.cache_salt or "",
            source=self.source,
        )

    @property
    def stops(self) -> list[str] | None:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class GenerationBody(SamplingBody):
    """What completions and chat have in common."""

    model_config = ConfigDict(json_schema_extra={"allOf": RULES})

    max_tokens: Annotated[Count | None, Field(json_schema_extra=at_most("max_model_len"))] = None
    n: Annotated[Count | None, Field(json_schema_extra=at_most("max_n"))] = None
    prompt_logprobs: NumLogprobs | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None

    @property
    def own_source(self) -> GrammarSource | None:
        return None if self.response_format is None else self.response_format.source

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        """Limits that are the server's, and rules between fields."""
        max_n = limits_of(info).max_n
        if self.n is not None and self.n > max_n:
            raise InvalidRequest(f"n is {self.n}; at most {max_n} completions of one prompt are served", param="n")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequest("prompt_logprobs are not streamed; leave stream out", param="prompt_logprobs")
        return self

    def wanted(self, meant: Meant, max_tokens: int | None, best_of: int, num_logprobs: int | None,
               of_prompt: OfPrompt | None) -> Wanted:  # fmt: skip
        """What it says in the fields that both routes have, with what each of them has its own words for."""
        wanted = self.sampled(meant, max_tokens, num_logprobs)
        return replace(wanted, n=self.n or 1, best_of=best_of, of_prompt=of_prompt)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage
