"""Request bodies, field by field: strict types, finite numbers, and nothing accepted that is not served.

A field of OpenAI's API that is not served is listed in UNSERVED and refused by name, unless its value asks for nothing.
Any other unknown field is refused as unknown.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, field_validator, model_validator

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
    "chat_template": (), "chat_template_kwargs": ({},), "guided_json": (), "guided_regex": (), "cache_salt": (),
}  # fmt: skip

Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def _asks_for_nothing(value: object, harmless: tuple[object, ...]) -> bool:
    return value is None or any(value == free and type(value) is type(free) for free in harmless)


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None  # not served; saying so is allowed


class GenerationBody(Body):
    """What completions and chat have in common. `user` is accepted as a label and has no effect."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Seed | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unserved(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, value in body.items():
            if name in UNSERVED and not _asks_for_nothing(value, UNSERVED[name]):
                raise InvalidRequest(f"{name} is not served", param=name, code="unsupported_parameter")
        return {name: value for name, value in body.items() if name not in UNSERVED}

    def check(self, max_n: int, max_stop: int) -> None:
        """Limits that are the server's, and rules between fields."""
        if self.n is not None and self.n > max_n:
            raise InvalidRequest(f"n is {self.n}; at most {max_n} completions of one prompt are served", param="n")
        if len(self.stops) > max_stop:
            raise InvalidRequest(f"{len(self.stops)} stop strings; at most {max_stop} are served", param="stop")
        if not all(self.stops):
            raise InvalidRequest("a stop string may not be empty", param="stop")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream to be true", param="stream_options")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """A text, token ids, or several of either, as a list of them.

    Checked by hand: a union of lists would collect an error for every item and branch, which for a small body of wrong
    items takes seconds and gigabytes.
    """
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise InvalidRequest("prompt must be a text, a list of token ids, or a list of either", param="prompt")
    if value and type(value[0]) is int:
        return [_token_ids(value, "prompt")]
    if value and isinstance(value[0], list):
        return [_token_ids(ids, f"prompt[{index}]") for index, ids in enumerate(value)]
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise InvalidRequest(f"prompt[{index}] is neither text nor token ids like the first", param="prompt")
    return value


def _token_ids(ids: Any, where: str) -> list[int]:
    if not isinstance(ids, list):
        raise InvalidRequest(f"{where} is not a list of token ids like the first", param="prompt")
    for index, token in enumerate(ids):
        if type(token) is not int:
            raise InvalidRequest(f"{where}[{index}] is not a token id", param="prompt")
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
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def check(self, max_n: int, max_stop: int) -> None:
        super().check(max_n, max_stop)
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens are the same thing; send one", param="max_tokens"
            )


class AdapterBody(Body):
    """`path` is a directory on the server, below one of its adapter roots; relative ones are taken below the first."""

    name: str
    path: Annotated[str, Field(min_length=1, max_length=4096)]
