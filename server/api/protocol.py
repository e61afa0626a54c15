"""Request bodies, field by field: strict types, finite numbers, and nothing accepted that is not served.

A field of OpenAI's API that is not served is listed in UNSERVED and refused by name, unless its value asks for nothing.
Any other unknown field is refused as unknown.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator, model_validator

from server.errors import InvalidRequest

# field -> values that ask for nothing, beside null
UNSERVED: dict[str, tuple[object, ...]] = {
    "audio": (), "best_of": (1,), "echo": (False,), "frequency_penalty": (0, 0.0), "function_call": ("none",),
    "functions": ([],), "logit_bias": ({},), "logprobs": (False,), "metadata": ({},), "min_p": (0, 0.0),
    "modalities": (["text"],), "parallel_tool_calls": (True, False), "prediction": (), "presence_penalty": (0, 0.0),
    "prompt_cache_key": (), "reasoning_effort": ("none",), "repetition_penalty": (1, 1.0),
    "response_format": ({"type": "text"},), "safety_identifier": (), "service_tier": ("auto", "default"),
    "store": (False,), "suffix": ("",), "tool_choice": ("none",), "tools": ([],), "top_logprobs": (0,),
    "verbosity": (), "web_search_options": (), "min_tokens": (0,), "ignore_eos": (False,), "stop_token_ids": ([],),
    "chat_template": (), "chat_template_kwargs": ({},), "guided_json": (), "guided_regex": (),
}  # fmt: skip

Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, lt=2**64)]  # what is served is less; this is so that a message can repeat it
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def _asks_for_nothing(value: object, harmless: tuple[object, ...]) -> bool:
    return value is None or any(value == free and type(value) is type(free) for free in harmless)


@dataclass(frozen=True)
class BodyLimits:
    """Counts that are checked before the items they count. pydantic hands them to validators as their context."""

    max_model_len: int  # tokens
    vocab_size: int
    max_prompts: int
    max_n: int
    max_stop: int
    max_stop_chars: int
    max_messages: int
    max_parts: int  # of all messages together


def _limits(info: ValidationInfo) -> BodyLimits:
    return cast(BodyLimits, info.context)


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, body: Any) -> Any:
        """At the first; pydantic would collect an error for each of a hundred thousand."""
        for name in body if isinstance(body, dict) else ():
            if name not in cls.model_fields:
                raise InvalidRequest(
                    f"{name[:100]!r} is not a field of this request", param=name[:100], code="unknown_parameter"
                )
        return body


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None  # not served; saying so is allowed


class GenerationBody(Body):
    """What completions and chat have in common. `user` is a label, which decides to which target of an alias its
    requests go. Only requests of one `cache_salt` share what the cache holds of equal beginnings."""

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Seed | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None

    @model_validator(mode="before")  # the validators of a class run last to first: this one before its parent's
    @classmethod
    def _refuse_unserved(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, value in body.items():
            if name in UNSERVED and not _asks_for_nothing(value, UNSERVED[name]):
                raise InvalidRequest(f"{name} is not served", param=name, code="unsupported_parameter")
        return {name: value for name, value in body.items() if name not in UNSERVED}

    @field_validator("stop", mode="before")
    @classmethod
    def _count_stops(cls, stop: Any, info: ValidationInfo) -> Any:
        limits = _limits(info)
        stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
        if len(stops) > limits.max_stop:
            raise InvalidRequest(f"{len(stops)} stop strings; at most {limits.max_stop} are served", param="stop")
        for text in stops:
            if isinstance(text, str) and not 0 < len(text) <= limits.max_stop_chars:
                problem = f"a stop string has {len(text):,} characters" if text else "a stop string may not be empty"
                raise InvalidRequest(f"{problem}; 1 to {limits.max_stop_chars:,} are served", param="stop")
        return stop

    @model_validator(mode="after")
    def _check(self, info: ValidationInfo) -> Self:
        """Limits that are the server's, and rules between fields."""
        max_n = _limits(info).max_n
        if self.n is not None and self.n > max_n:
            raise InvalidRequest(f"n is {self.n}; at most {max_n} completions of one prompt are served", param="n")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def _prompts(value: Any, info: ValidationInfo) -> list[str] | list[list[int]]:
    """A text, token ids, or several of either, as a list of them.

    Checked by hand: a union of lists would collect an error for every item and branch, which for a small body of wrong
    items takes seconds and gigabytes.
    """
    limits = _limits(info)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise InvalidRequest("prompt must be a text, a list of token ids, or a list of either", param="prompt")
    if value and type(value[0]) is int:
        return [_token_ids(value, "prompt", limits)]
    if not 0 < len(value) <= limits.max_prompts:
        raise InvalidRequest(
            f"{len(value)} prompts in one request; 1 to {limits.max_prompts} are served", param="prompt"
        )
    if isinstance(value[0], list):
        return [_token_ids(ids, f"prompt[{index}]", limits) for index, ids in enumerate(value)]
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise InvalidRequest(f"prompt[{index}] is neither text nor token ids like the first", param="prompt")
    return value


def _token_ids(ids: Any, where: str, limits: BodyLimits) -> list[int]:
    if not isinstance(ids, list):
        raise InvalidRequest(f"{where} is not a list of token ids like the first", param="prompt")
    if len(ids) > limits.max_model_len:
        raise InvalidRequest(
            f"{where} has {len(ids):,} tokens; the model's context has {limits.max_model_len:,}",
            param="prompt",
            code="context_length_exceeded",
        )
    if set(map(type, ids)) - {int}:
        index = next(index for index, token in enumerate(ids) if type(token) is not int)
        raise InvalidRequest(f"{where}[{index}] is not a token id", param="prompt")
    if ids and not (min(ids) >= 0 and max(ids) < limits.vocab_size):
        index = next(index for index, token in enumerate(ids) if not 0 <= token < limits.vocab_size)
        raise InvalidRequest(
            f"{where}[{index}] is {str(ids[index])[:40]}; token ids are 0 to {limits.vocab_size - 1}", param="prompt"
        )
    return ids


class CompletionBody(GenerationBody):
    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts)]


class TextPart(Body):
    type: Literal["text"]
    text: str


# fields of an answer's message, which clients send back with the conversation; empty, they say nothing
_EMPTY_IN_MESSAGE: tuple[object, ...] = ([], {}, "")
_UNSERVED_IN_MESSAGE = frozenset({
    "annotations", "audio", "function_call", "name", "reasoning_content", "refusal", "tool_call_id", "tool_calls",
})  # fmt: skip


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    @model_validator(mode="before")
    @classmethod
    def _refuse_unserved(cls, message: Any) -> Any:
        if not isinstance(message, dict):
            return message
        for name, value in message.items():
            if name in _UNSERVED_IN_MESSAGE and not _asks_for_nothing(value, _EMPTY_IN_MESSAGE):
                raise InvalidRequest(
                    f"{name} in a message is not served", param="messages", code="unsupported_parameter"
                )
        return {name: value for name, value in message.items() if name not in _UNSERVED_IN_MESSAGE}

    @field_validator("content", mode="before")
    @classmethod
    def _refuse_other_parts(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
                raise InvalidRequest(f"content of type {part['type'][:40]!r} is not served", param="messages")
        return content

    @property
    def template_role(self) -> str:
        """`developer` is OpenAI's later word for `system`; templates know only that one, and would drop the other."""
        return "system" if self.role == "developer" else self.role

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Count | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _count(cls, messages: Any, info: ValidationInfo) -> Any:
        limits = _limits(info)
        if not isinstance(messages, list):
            return messages
        if len(messages) > limits.max_messages:
            raise InvalidRequest(
                f"{len(messages):,} messages; at most {limits.max_messages:,} are served", param="messages"
            )
        contents = (message.get("content") for message in messages if isinstance(message, dict))
        parts = sum(len(content) for content in contents if isinstance(content, list))
        if parts > limits.max_parts:
            raise InvalidRequest(
                f"{parts:,} parts of content; at most {limits.max_parts:,} are served", param="messages"
            )
        return messages

    @model_validator(mode="after")
    def _check_max_tokens(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens are the same thing; send one", param="max_tokens"
            )
        return self


class AdapterBody(Body):
    """`path` is a directory on the server, below one of its adapter roots; relative ones are taken below the first.
    `upload` is the id of one that is complete, `source` a place that the operator allows; it is one of the three.
    `ignore_keys` are unknown keys of the adapter's configuration that may be passed over. `manifest` stands for the one
    that lies there. `verify`: compare with merged weights before the name means anything."""

    name: str | None = None
    path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    upload: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    source: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    manifest: dict[str, Any] | None = None
    verify: bool = False
    ignore_keys: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=64, fail_fast=True)] = []


class RollbackBody(Body):
    """`revision`: the first digits of the one to go back to; none: the one before."""

    revision: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class AliasTarget(Body):
    model: Annotated[str, Field(max_length=256)]
    weight: Annotated[Finite, Field(ge=0)] = 1.0


class AliasBody(Body):
    alias: str | None = None
    targets: Annotated[list[AliasTarget], Field(min_length=1, max_length=32, fail_fast=True)]
