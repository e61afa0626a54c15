"""Answers of /v1/messages, and its errors: Anthropic's."""

from typing import Literal

from server.api.protocol.answers.answer import Answer

StopReason = Literal["end_turn", "max_tokens", "stop_sequence"]


class TextBlockAnswer(Answer):
    type: Literal["text"]
    text: str
    citations: None


class MessageUsage(Answer):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


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
    content: list[TextBlockAnswer]
    usage: WholeMessageUsage


class TextDelta(Answer):
    type: Literal["text_delta"]
    text: str


class MessageEvent(Answer):
    """`type` says which of the others are there."""

    type: Literal[
        "message_start", "content_block_start", "ping", "content_block_delta", "content_block_stop", "message_delta",
        "message_stop",
    ]  # fmt: skip
    message: MessageAnswer | None = None
    index: int = 0
    content_block: TextBlockAnswer | None = None
    delta: TextDelta | MessageEnd | None = None
    usage: MessageUsage | None = None


class TokenCount(Answer):
    input_tokens: int


class MessageError(Answer):
    type: str
    message: str


class MessageErrorAnswer(Answer):
    type: Literal["error"]
    error: MessageError
    request_id: str
