"""The body of POST /v1/chat/completions."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
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

from server.api.protocol.body import Body, Count, Unserved, limits_of, of_other_media
from server.api.protocol.generation import RULES, GenerationBody, NumLogprobs
from server.api.protocol.schema import NOT_TRUE, NOTHING, at_most, given, one_of
from server.errors import InvalidRequest

# variables of a template that are not its caller's to set
_RESERVED = frozenset({
    "add_generation_prompt", "bos_token", "chat_template", "continue_final_message", "eos_token", "messages",
    "pad_token", "tokenize", "tools",
})  # fmt: skip
MAX_TEMPLATE_KWARGS = 64
MAX_DEPTH = 32  # of lists and objects in one another


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    WITHIN = "messages"
    # fields of an answer's message, which clients send back with the conversation; empty, they say nothing
    UNSERVED: ClassVar[Unserved] = {
        name: ([], {}, "")
        for name in ("annotations", "audio", "function_call", "name", "refusal", "tool_call_id", "tool_calls")
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    reasoning_content: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _refuse_other_parts(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(kind := part.get("type"), str) and kind != "text":
                told = f"content of type {kind[:40]!r} is not served{of_other_media(kind)}"
                raise InvalidRequest(told, param="messages")
        return content

    @model_validator(mode="after")
    def _check_reasoning(self) -> Self:
        if self.reasoning_content and self.role != "assistant":
            raise InvalidRequest(
                f"reasoning_content in a message of the role {self.role} is not served: only assistants reason",
                param="messages",
                code="unsupported_parameter",
            )
        return self

    @property
    def template_role(self) -> str:
        """`developer` is OpenAI's later word for `system`; templates know only that one, and would drop the other."""
        return "system" if self.role == "developer" else self.role

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def said(self) -> dict[str, str]:
        """As templates read it."""
        told = {"role": self.template_role, "content": self.text}
        return {**told, "reasoning_content": self.reasoning_content} if self.reasoning_content else told


def counted(messages: Any, info: ValidationInfo, param: str = "messages") -> Any:
    """Before they are built."""
    limits = limits_of(info)
    if not isinstance(messages, list):
        return messages
    if len(messages) > limits.max_messages:
        raise InvalidRequest(f"{len(messages):,} messages; at most {limits.max_messages:,} are served", param=param)
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    parts = sum(len(content) for content in contents if isinstance(content, list))
    if parts > limits.max_parts:
        raise InvalidRequest(f"{parts:,} parts of content; at most {limits.max_parts:,} are served", param=param)
    return messages


def _template_kwargs(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > MAX_TEMPLATE_KWARGS:
        raise InvalidRequest(
            f"chat_template_kwargs must be an object of at most {MAX_TEMPLATE_KWARGS} variables",
            param="chat_template_kwargs",
        )
    for name in value:
        if name in _RESERVED:
            raise InvalidRequest(
                f"{name!r} is not for chat_template_kwargs: the server sets it", param="chat_template_kwargs"
            )
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner = [it.values() if isinstance(it, dict) else it for it in level]
        level = [it for items in inner for it in items if isinstance(it, dict | list)]
    if level:
        raise InvalidRequest(
            f"chat_template_kwargs has lists or objects more than {MAX_DEPTH} deep", param="chat_template_kwargs"
        )
    return value


def check_continuation(messages: Sequence[Message] | None, continues: bool | None, asks: bool | None) -> None:
    """Raises InvalidRequest where the last message cannot be continued."""
    if not continues:
        return
    if asks:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt ask for two ends of the prompt; send one",
            param="continue_final_message",
        )
    if not messages or messages[-1].role != "assistant":
        raise InvalidRequest(
            "continue_final_message needs a last message of the role assistant", param="continue_final_message"
        )


_TEMPLATE_KWARGS: JsonDict = {
    "type": "object",
    "description": "What the model's chat template reads, beside what the server sets.",
    "maxProperties": MAX_TEMPLATE_KWARGS,
    "propertyNames": {"not": {"enum": [*sorted(_RESERVED)]}},
}
TemplateKwargs = Annotated[dict[str, Any], PlainValidator(_template_kwargs), WithJsonSchema(_TEMPLATE_KWARGS)]
Messages = Annotated[
    list[Message],
    Field(min_length=1, fail_fast=True, json_schema_extra=at_most("max_messages", is_list=True)),
]
_RULES: list[JsonValue] = [
    *RULES,
    one_of(max_tokens=NOTHING, max_completion_tokens=NOTHING),
    {"anyOf": [given(logprobs={"const": True}), {"properties": {"top_logprobs": {"enum": [None, 0]}}}]},
    one_of(continue_final_message=NOT_TRUE, add_generation_prompt=NOT_TRUE),
]


class ChatBody(GenerationBody):
    UNSERVED: ClassVar[Unserved] = {
        **GenerationBody.UNSERVED, "audio": (), "chat_template": (),
        "documents": ([],), "echo": (False,), "function_call": ("none",), "functions": ([],),
        "include_reasoning": (True,), "modalities": (["text"],), "parallel_tool_calls": (True, False),
        "prediction": (), "tool_choice": ("none",), "tools": ([],), "verbosity": (), "web_search_options": (),
    }  # fmt: skip

    model_config = ConfigDict(json_schema_extra={"allOf": _RULES})

    messages: Messages
    max_completion_tokens: Annotated[Count | None, Field(json_schema_extra=at_most("max_model_len"))] = None
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    _count = field_validator("messages", mode="before")(counted)

    @model_validator(mode="after")
    def _check_more(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest(
                "max_tokens and max_completion_tokens are the same thing; send one", param="max_tokens"
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
        if self.reasoning_effort is not None and "reasoning_effort" in (self.chat_template_kwargs or {}):
            raise InvalidRequest(
                "reasoning_effort is in chat_template_kwargs too; send one of them", param="reasoning_effort"
            )
        check_continuation(self.messages, self.continue_final_message, self.add_generation_prompt)
        return self
