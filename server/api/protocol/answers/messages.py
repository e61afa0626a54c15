"""Answers of /v1/messages, and its errors: Anthropic's."""

from typing import Any, Literal

from server.api.protocol.answers.answer import Answer

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class TextBlockAnswer(Answer):
    type: Literal["text"]
    text: str
    citations: None


class ThinkingBlockAnswer(Answer):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlockAnswer(Answer):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


BlockAnswer = TextBlockAnswer | ThinkingBlockAnswer | ToolUseBlockAnswer


class MessageTokensDetails(Answer):
    thinking_tokens: int


class MessageUsage(Answer):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: MessageTokensDetails


class WholeMessageUsage(MessageUsage):
    service_tier: Literal["standard"]


class MessageEnd(Answer):
    stop_reason: StopReason | None
    stop_sequence: str | None
    stop_details: None
    container: None


class MessageAnswer(MessageEnd):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[BlockAnswer]
    usage: WholeMessageUsage


class TextDelta(Answer):
    type: Literal["text_delta"]
    text: str


class ThinkingDelta(Answer):
    type: Literal["thinking_delta"]
    thinking: str


class SignatureDelta(Answer):
    type: Literal["signature_delta"]
    signature: str


class InputDelta(Answer):
    type: Literal["input_json_delta"]
    partial_json: str


class MessageEvent(Answer):
    """`type` says which of the others are there."""

    type: Literal[
        "message_start", "content_block_start", "ping", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    message: MessageAnswer | None = None
    index: int = 0
    content_block: BlockAnswer | None = None
    delta: TextDelta | ThinkingDelta | SignatureDelta | InputDelta | MessageEnd | None = None
    usage: MessageUsage | None = None


class TokenCount(Answer):
    input_tokens: int


class MessageErrorDetails(Answer):
    error_code: str
    unsupported: list[str]


class MessageError(Answer):
    type: str
    message: str
    details: MessageErrorDetails | None = None


class MessageErrorAnswer(Answer):
    type: Literal["error"]
    error: MessageError
    request_id: str
