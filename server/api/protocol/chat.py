"""The body of POST /v1/chat/completions."""

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, PlainValidator, WithJsonSchema, field_validator, model_validator
from pydantic.config import JsonDict

from server.api.protocol.body import Count, Unserved
from server.api.protocol.generation import RULES, GenerationBody, NumLogprobs
from server.api.protocol.json_text import is_deeper
from server.api.protocol.said import Messages, check_continuation, counted
from server.api.protocol.schema import NOT_TRUE, NOTHING, at_most, given, one_of
from server.api.protocol.tools import ToolChoice, Tools, chosen, tools_wanted
from server.api.texts.speech import ToolsWanted
from server.errors import InvalidRequest

# variables of a template that are not its caller's to set
_RESERVED = frozenset({
    "add_generation_prompt", "bos_token", "chat_template", "continue_final_message", "eos_token", "messages",
    "pad_token", "tokenize", "tools",
})  # fmt: skip
MAX_TEMPLATE_KWARGS = 64
MAX_DEPTH = 32  # of lists and objects in one another


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
    if is_deeper(value, MAX_DEPTH):
        raise InvalidRequest(
            f"chat_template_kwargs has lists or objects more than {MAX_DEPTH} deep", param="chat_template_kwargs"
        )
    return value


_TEMPLATE_KWARGS: JsonDict = {
    "type": "object",
    "description": "What the model's chat template reads, beside what the server sets.",
    "maxProperties": MAX_TEMPLATE_KWARGS,
    "propertyNames": {"not": {"enum": [*sorted(_RESERVED)]}},
}
TemplateKwargs = Annotated[dict[str, Any], PlainValidator(_template_kwargs), WithJsonSchema(_TEMPLATE_KWARGS)]
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
        "modalities": (["text"],), "prediction": (), "verbosity": (), "web_search_options": (),
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
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None

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
        _ = self.tools_wanted
        return self

    @cached_property
    def tools_wanted(self) -> ToolsWanted | None:
        """Raises InvalidRequest."""
        tools = [it.function.tool for it in self.tools or ()]
        return tools_wanted(tools, chosen(self.tool_choice, self.parallel_tool_calls is not False))
