"""The bodies of POST /v1/messages and of POST /v1/messages/count_tokens: Anthropic's."""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator

from server.api.protocol.body import Body, Count, Finite, Label, Unserved, limits_of, of_other_media
from server.api.protocol.chat import counted
from server.api.protocol.generation import STOP_STRINGS, Model, TopP, checked_stops
from server.api.protocol.schema import at_most
from server.errors import InvalidRequest


class CacheControl(Body):
    """A label: equal beginnings are found in the cache without it."""

    WITHIN = "cache_control"

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Body):
    WITHIN = "content"
    UNSERVED: ClassVar[Unserved] = {"citations": ([],), "parsed_output": ()}

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


def _blocks(content: Any, info: ValidationInfo) -> Any:
    """A text stands for one block."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        name = str(info.field_name)
        raise InvalidRequest(f"{name} must be a text, or a list of text blocks", param=name, code="invalid_value")
    return content


Text = Annotated[
    list[TextBlock], Field(fail_fast=True), BeforeValidator(_blocks, json_schema_input_type=str | list[TextBlock])
]


class Turn(Body):
    WITHIN = "messages"

    role: Literal["user", "assistant"]
    content: Text


class RequestMetadata(Body):
    WITHIN = "metadata"

    user_id: Label | None = None


class PromptBody(Body):
    """What is counted, or answered."""

    UNSERVED: ClassVar[Unserved] = {
        "betas": ([],), "container": (), "context_management": (), "diagnostics": (), "inference_geo": (),
        "mcp_servers": ([],), "output_config": ({},), "output_format": (), "speed": ("standard",),
        "thinking": ({"type": "disabled"},), "tool_choice": ({"type": "none"},), "tools": ([],),
        "user_profile_id": (), "workspace_id": (),
    }  # fmt: skip

    model: Model
    messages: Annotated[
        list[Turn], Field(min_length=1, fail_fast=True, json_schema_extra=at_most("max_messages", is_list=True))
    ]
    system: Text | None = None
    cache_control: CacheControl | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _count_and_refuse_other_blocks(cls, messages: Any, info: ValidationInfo) -> Any:
        for message in counted(messages, info) if isinstance(messages, list) else ():
            if isinstance(message, dict):
                _refuse_other_blocks(message.get("content"), "messages")
        return messages

    @field_validator("system", mode="before")
    @classmethod
    def _count_and_refuse_other_blocks_there(cls, system: Any, info: ValidationInfo) -> Any:
        most = limits_of(info).max_parts
        if isinstance(system, list) and len(system) > most:
            raise InvalidRequest(f"{len(system):,} blocks in system; at most {most:,} are served", param="system")
        _refuse_other_blocks(system, "system")
        return system

    @property
    def said(self) -> list[dict[str, str]]:
        """As templates read it."""
        system = text_of(self.system or ())
        turns = [{"role": turn.role, "content": text_of(turn.content)} for turn in self.messages]
        return [{"role": "system", "content": system}, *turns] if system else turns

    @property
    def continues_last_turn(self) -> bool:
        """The model's own turn has begun already."""
        return self.messages[-1].role == "assistant"


class MessageBody(PromptBody):
    max_tokens: Annotated[Count, Field(json_schema_extra=at_most("max_model_len"))]
    temperature: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_sequences: Annotated[list[str], Field(fail_fast=True), WithJsonSchema(STOP_STRINGS)] | None = None
    stream: bool | None = None
    metadata: RequestMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None

    @field_validator("stop_sequences", mode="before")
    @classmethod
    def _count_stops(cls, stops: Any, info: ValidationInfo) -> Any:
        return checked_stops(stops, info, "stop_sequences")

    @property
    def who(self) -> str | None:
        return None if self.metadata is None else self.metadata.user_id


def text_of(blocks: Iterable[TextBlock]) -> str:
    return "".join(block.text for block in blocks)


def _refuse_other_blocks(content: Any, param: str) -> None:
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and isinstance(block.get("type"), str) and block["type"] != "text":
            raise InvalidRequest(
                f"content of type {block['type'][:40]!r} in {param} is not served{of_other_media(block['type'])}",
                param=param,
                code="unsupported_parameter",
            )
