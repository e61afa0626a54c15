"""Answers of /v1/responses."""

from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.protocol.answers.answer import Answer, Error
from server.api.protocol.answers.generation import TokenLogprob

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(Answer):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[TokenLogprob]


class OutputMessage(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Status
    content: list[OutputText]


class FunctionCallItem(Answer):
    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    arguments: str


class ReasoningText(Answer):
    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Answer):
    id: str
    type: Literal["reasoning"]
    status: Status
    summary: Annotated[list[Any], Field(max_length=0)]
    content: list[ReasoningText]
    encrypted_content: None


Item = OutputMessage | FunctionCallItem | ReasoningItem


class InputTokensDetails(Answer):
    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Answer):
    reasoning_tokens: int


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens"]


class ReasoningTold(Answer):
    effort: str | None
    summary: None


class TextFormat(Answer):
    type: Literal["text", "json_object"]


class SchemaFormatTold(Answer):
    """As it was asked for."""

    type: Literal["json_schema"]
    name: str
    description: str | None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None


class TextTold(Answer):
    format: TextFormat | SchemaFormatTold


class ToolTold(Answer):
    """As it was understood."""

    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class NamedToolTold(Answer):
    type: Literal["function"]
    name: str


class AllowedToolsTold(Answer):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[NamedToolTold]


class ResponseAnswer(Answer):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Status
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[Item]
    usage: ResponseUsage | None
    background: Literal[False]
    error: None
    conversation: None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt: None
    prompt_cache_key: str | None
    prompt_cache_retention: None
    reasoning: ReasoningTold
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: TextTold
    tool_choice: Literal["none", "auto", "required"] | NamedToolTold | AllowedToolsTold
    tools: list[ToolTold]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    user: str | None
    frequency_penalty: float
    presence_penalty: float


class ResponseEvent(Answer):
    """`type` says which of the others are there. An `error` ends a stream that fails."""

    type: Literal[
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.done", "response.reasoning_text.delta",
        "response.reasoning_text.done", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.content_part.done", "response.output_item.done",
        "response.completed", "response.incomplete", "error",
    ]  # fmt: skip
    sequence_number: int
    response: ResponseAnswer | None = None
    output_index: int = 0
    content_index: int = 0
    item_id: str = ""
    item: Item | None = None
    part: OutputText | ReasoningText | None = None
    delta: str = ""
    text: str = ""
    arguments: str = ""
    logprobs: list[TokenLogprob] = []
    code: str | None = None
    message: str = ""
    param: str | None = None
    error: Error | None = None


class InputTokensAnswer(Answer):
    object: Literal["response.input_tokens"]
    input_tokens: int
