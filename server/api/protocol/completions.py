"""The body of POST /v1/completions."""

from typing import Annotated, Any, ClassVar, Self

from pydantic import ConfigDict, Field, JsonValue, PlainValidator, ValidationInfo, WithJsonSchema, model_validator
from pydantic.config import JsonDict

from server.api.protocol.body import BodyLimits, Count, Unserved, limits_of
from server.api.protocol.generation import RULES, GenerationBody, NumLogprobs
from server.api.protocol.schema import SOMETHING, TOKEN_IDS, at_most, given, limit
from server.errors import ContextExceeded, InvalidRequest


def prompts_of(value: Any, info: ValidationInfo) -> list[str] | list[list[int]]:
    """A text, token ids, or several of either, as a list of them.

    Checked by hand: a union of lists would collect an error for every item and branch, which for a small body of wrong
    items takes seconds and gigabytes.
    """
    limits, param = limits_of(info), info.field_name or "prompt"
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise InvalidRequest(f"{param} must be a text, a list of token ids, or a list of either", param=param)
    if value and type(value[0]) is int:
        return [token_ids(value, param, limits, param)]
    if not 0 < len(value) <= limits.max_prompts:
        raise InvalidRequest(f"{len(value)} prompts in one request; 1 to {limits.max_prompts} are served", param=param)
    if isinstance(value[0], list):
        return [token_ids(ids, f"{param}[{index}]", limits, param) for index, ids in enumerate(value)]
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise InvalidRequest(f"{param}[{index}] is neither text nor token ids like the first", param=param)
    return value


def token_ids(ids: Any, where: str, limits: BodyLimits, param: str) -> list[int]:
    """Raises InvalidRequest, naming the first that is none."""
    if not isinstance(ids, list):
        raise InvalidRequest(f"{where} is not a list of token ids like the first", param=param)
    if len(ids) > limits.max_model_len:
        raise ContextExceeded(f"{where} is too long: it has {len(ids):,} tokens", limits.max_model_len, param)
    if set(map(type, ids)) - {int}:
        index = next(index for index, token in enumerate(ids) if type(token) is not int)
        raise InvalidRequest(f"{where}[{index}] is not a token id", param=param)
    if ids and not (min(ids) >= 0 and max(ids) < limits.vocab_size):
        index = next(index for index, token in enumerate(ids) if not 0 <= token < limits.vocab_size)
        raise InvalidRequest(
            f"{where}[{index}] is {str(ids[index])[:40]}; token ids are 0 to {limits.vocab_size - 1}", param=param
        )
    return ids


def _several(items: JsonDict) -> JsonDict:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": limit("max_prompts")}


_PROMPT: JsonDict = {**TOKEN_IDS, "minItems": 1}
_PROMPTS: JsonDict = {"anyOf": [{"type": "string"}, _PROMPT, _several({"type": "string"}), _several(_PROMPT)]}
Prompts = Annotated[list[str] | list[list[int]], PlainValidator(prompts_of), WithJsonSchema(_PROMPTS)]
_OF_PROMPT: JsonDict = {"anyOf": [given(echo={"const": True}), given(prompt_logprobs=SOMETHING)]}
_RULES: list[JsonValue] = [*RULES, {"anyOf": [_OF_PROMPT, {"properties": {"max_tokens": {"not": {"const": 0}}}}]}]


class CompletionBody(GenerationBody):
    """`max_tokens` may be 0 where something is asked of the prompt itself, with `echo` or `prompt_logprobs`."""

    UNSERVED: ClassVar[Unserved] = {**GenerationBody.UNSERVED, "suffix": ("",)}

    model_config = ConfigDict(json_schema_extra={"allOf": _RULES})

    prompt: Prompts
    max_tokens: Annotated[
        Annotated[int, Field(ge=0, lt=2**64)] | None, Field(json_schema_extra=at_most("max_model_len"))
    ] = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
    best_of: Annotated[Count | None, Field(json_schema_extra=at_most("max_n"))] = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check_more(self, info: ValidationInfo) -> Self:
        n, most = self.n or 1, limits_of(info).max_n
        if self.best_of is not None and not n <= self.best_of <= most:
            raise InvalidRequest(f"best_of is {self.best_of}; it may be from n, {n}, to {most}", param="best_of")
        if self.best_of is not None and self.best_of > n and self.stream:
            raise InvalidRequest("which of best_of is best is known at the end; leave stream out", param="best_of")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise InvalidRequest("max_tokens is 0, and nothing is asked of the prompt", param="max_tokens")
        return self
