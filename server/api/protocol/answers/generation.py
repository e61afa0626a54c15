"""Answers of completions, chat, embeddings and tokens."""

from typing import Literal

from server.api.protocol.answers.answer import Answer

Finish = Literal["stop", "length"]
ChatFinish = Literal["stop", "length", "tool_calls"]
Stop = str | int


class PromptTokensDetails(Answer):
    cached_tokens: int


class CompletionTokensDetails(Answer):
    reasoning_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class PromptLogprob(Answer):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionLogprobs(Answer):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(Answer):
    index: int
    text: str
    finish_reason: Finish | None
    logprobs: CompletionLogprobs | None
    stop_reason: Stop | None
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str | None


class CompletionChunk(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str | None


class TopLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    content: list[TokenLogprob]
    refusal: None


class CalledFunction(Answer):
    """`arguments`: JSON text."""

    name: str
    arguments: str


class ToolCall(Answer):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Answer):
    """`content` is null where there are calls and nothing else was said."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = []


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    finish_reason: ChatFinish
    logprobs: ChatLogprobs | None
    stop_reason: Stop | None


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobs | None = None
    usage: Usage
    system_fingerprint: str | None


class FunctionPiece(Answer):
    name: str = ""
    arguments: str


class ToolCallPiece(Answer):
    """`id`, `type` and the function's name come with the first piece of a call."""

    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionPiece


class ChatDelta(Answer):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[ToolCallPiece] = []


class ChatChunkChoice(Answer):
    index: int
    delta: ChatDelta
    finish_reason: ChatFinish | None
    logprobs: ChatLogprobs | None
    stop_reason: Stop | None = None


class ChatCompletionChunk(Answer):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None


class Embedding(Answer):
    """`embedding`: numbers, or in base64 the bytes of little-endian float32 ones."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Answer):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Tokens(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Prompt(Answer):
    prompt: str
