"""The bodies of POST /v1/messages and of POST /v1/messages/count_tokens: Anthropic's."""

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator, model_validator

from server.api.protocol.body import Body, Count, Finite, Label, Unserved, limits_of
from server.api.protocol.generation import STOP_STRINGS, Model, TopP, checked_stops
from server.api.protocol.message_blocks import OF_ROLE, CacheControl, Text, Turn, refuse_other_blocks, said, text_of
from server.api.protocol.message_tools import (
    MessageToolChoice,
    MessageTools,
    OutputConfig,
    OutputFormat,
    Thinking,
    chosen,
)
from server.api.protocol.said import counted
from server.api.protocol.schema import NOTHING, at_most, one_of
from server.api.protocol.tools import tools_wanted
from server.api.texts.speech import ToolsWanted
from server.errors import InvalidRequest
from server.grammars.source import GrammarSource

# by which Anthropic's client knows that it has to send the whole conversation
NO_THREADS = "thread_unsupported_request"


class RequestMetadata(Body):
    WITHIN = "metadata"

    user_id: Label | None = None


_ONE_FORMAT = one_of(output_format=NOTHING, output_config={"properties": {"format": NOTHING}})


class PromptBody(Body):
    """What is counted, or answered. `output_format` is what `output_config.format` was called before."""

    UNSERVED: ClassVar[Unserved] = {
        "betas": ([],), "container": (), "context_management": (), "diagnostics": (), "inference_geo": (),
        "mcp_servers": ([],), "parallel_tool_calls": (True,), "reasoning_effort": (),
        "response_format": ({"type": "text"},), "speed": ("standard",), "thread": (), "user_profile_id": (),
        "workspace_id": (),
    }  # fmt: skip
    REMEDIES = {
        "parallel_tool_calls": "send tool_choice.disable_parallel_tool_use",
        "reasoning_effort": "send output_config.effort",
        "response_format": "send output_config.format",
        "thread": "nothing is stored here, so send the whole conversation as messages",
    }
    CODES = {"thread": NO_THREADS}

    model_config = ConfigDict(json_schema_extra={"allOf": [_ONE_FORMAT]})

    model: Model
    messages: Annotated[
        list[Turn], Field(min_length=1, fail_fast=True, json_schema_extra=at_most("max_messages", is_list=True))
    ]
    system: Text | None = None
    cache_control: CacheControl | None = None
    tools: MessageTools | None = None
    tool_choice: MessageToolChoice | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    thinking: Thinking | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _count_and_refuse_other_blocks(cls, messages: Any, info: ValidationInfo) -> Any:
        known = [it for it in messages if isinstance(it, dict)] if isinstance(messages, list) else []
        for message in known if counted(messages, info) else ():
            role = message.get("role")
            if isinstance(role, str) and role in OF_ROLE:
                refuse_other_blocks(message.get("content"), "messages", OF_ROLE[role], f" of the role {role}")
        return messages

    @field_validator("system", mode="before")
    @classmethod
    def _count_and_refuse_other_blocks_there(cls, system: Any, info: ValidationInfo) -> Any:
        most = limits_of(info).max_parts
        if isinstance(system, list) and len(system) > most:
            raise InvalidRequest(f"{len(system):,} blocks in system; at most {most:,} are served", param="system")
        refuse_other_blocks(system, "system", ("text",))
        return system

    @model_validator(mode="after")
    def _check_between_fields(self) -> Self:
        if self.output_format is not None and self.output_config is not None and self.output_config.format is not None:
            raise InvalidRequest("output_format and output_config.format are the same thing; send the latter",
                                 param="output_format", code="invalid_value")  # fmt: skip
        if self.continues_last_turn and self.messages[-1].calls:
            raise InvalidRequest("the last turn calls tools; send what came of it as tool_result in a user's turn",
                                 param="messages", code="invalid_value")  # fmt: skip
        _ = self.said, self.tools_wanted
        return self

    @cached_property
    def said(self) -> list[dict[str, Any]]:
        """As templates read it. Raises InvalidRequest."""
        system, turns = text_of(self.system or ()), said(self.messages)
        return [{"role": "system", "content": system}, *turns] if system else turns

    @cached_property
    def tools_wanted(self) -> ToolsWanted | None:
        """Raises InvalidRequest."""
        return tools_wanted([it.tool for it in self.tools or ()], chosen(self.tool_choice))

    @property
    def source(self) -> GrammarSource | None:
        """The grammar that the request brings."""
        format = None if self.output_config is None else self.output_config.format
        format = format or self.output_format
        return None if format is None else format.source

    @property
    def effort(self) -> str | None:
        return None if self.output_config is None else self.output_config.effort

    @property
    def thinks(self) -> bool | None:
        """None: as the model does by itself."""
        return None if self.thinking is None else self.thinking.is_on

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

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.thinking is not None:
            self.thinking.check_budget(self.max_tokens)
        return self

    @property
    def who(self) -> str | None:
        return None if self.metadata is None else self.metadata.user_id
