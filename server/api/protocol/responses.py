"""The body of POST /v1/responses: OpenAI's, as far as it needs nothing that the server would have to remember."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, ValidationInfo, WithJsonSchema, field_validator, model_validator
from pydantic.config import JsonDict

from server.api.protocol.body import Body, Count, Label, Unserved, of_other_media
from server.api.protocol.chat import counted
from server.api.protocol.generation import STREAM_OPTIONS, NumLogprobs, SamplingBody
from server.api.protocol.schema import at_most, given
from server.errors import InvalidRequest

LOGPROBS = "message.output_text.logprobs"
# of items that no answer has, and images that no request may send: there is nothing to include
_OF_WHAT_THERE_IS_NOT = frozenset({
    "code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results",
    "message.input_image.image_url", "reasoning.encrypted_content", "web_search_call.action.sources",
    "web_search_call.results",
})  # fmt: skip
_NOTHING_IS_STORED = "nothing is stored here; send the whole conversation as input"


class InputPart(Body):
    """`logprobs` are what an earlier answer was told; no model reads them."""

    WITHIN = "input"
    UNSERVED: ClassVar[Unserved] = {"annotations": ([],), "parsed": (), "prompt_cache_breakpoint": ()}

    type: Literal["input_text", "output_text"]
    text: str
    logprobs: list[Any] | None = None


class InputMessage(Body):
    """`id` and `status` come with the output of an earlier answer, and say nothing to a model."""

    WITHIN = "input"
    UNSERVED: ClassVar[Unserved] = {"phase": ()}

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[list[InputPart], Field(fail_fast=True)]
    id: Label | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    @field_validator("content", mode="before", json_schema_input_type=str | list[InputPart])
    @classmethod
    def _parts(cls, content: Any) -> Any:
        """A text stands for one part."""
        if isinstance(content, str):
            return [{"type": "input_text", "text": content}]
        if not isinstance(content, list):
            raise InvalidRequest(
                "content in input must be a text, or a list of parts", param="input", code="invalid_value"
            )
        return content

    @property
    def said(self) -> dict[str, str]:
        """As templates read it, which know OpenAI's later word for `system` no more than in chat."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


class Reasoning(Body):
    WITHIN = "reasoning"
    UNSERVED: ClassVar[Unserved] = {
        "summary": ("auto",), "generate_summary": (), "context": ("auto",), "mode": ("standard",),
    }  # fmt: skip

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class TextConfig(Body):
    WITHIN = "text"
    UNSERVED: ClassVar[Unserved] = {"format": ({"type": "text"},), "verbosity": ()}


class ResponseStreamOptions(Body):
    """The last event tells the usage in any case."""

    WITHIN = "stream_options"
    UNSERVED: ClassVar[Unserved] = {"include_obfuscation": (False,), "include_usage": (True, False)}


Input = Annotated[
    list[InputMessage],
    Field(min_length=1, fail_fast=True, json_schema_extra=at_most("max_messages", is_list=True)),
]
_INCLUDED: JsonDict = {"type": "string", "enum": [LOGPROBS, *sorted(_OF_WHAT_THERE_IS_NOT)]}
_RULES: list[JsonValue] = [
    STREAM_OPTIONS,
    {"anyOf": [
        given(include={"type": "array", "contains": {"const": LOGPROBS}}),
        {"properties": {"top_logprobs": {"enum": [None, 0]}}},
    ]},
]  # fmt: skip


class ResponseBody(SamplingBody):
    """`parallel_tool_calls`, `tool_choice` and `max_tool_calls` change nothing without tools, and come back as sent."""

    UNSERVED: ClassVar[Unserved] = {
        **SamplingBody.UNSERVED, "access_programs": (), "background": (False,), "background_options": (),
        "context_management": ([],), "conversation": (), "image": (), "max_completion_tokens": (), "max_tokens": (),
        "messages": (), "n": (1,), "previous_response_id": (), "prompt": (),
        "reasoning_effort": (), "tools": ([],),
        "truncation": ("disabled",),
    }  # fmt: skip
    REMEDIES = {
        "background": "wait for the answer, or let it be streamed",
        "conversation": _NOTHING_IS_STORED,
        "max_completion_tokens": "send max_output_tokens",
        "max_tokens": "send max_output_tokens",
        "messages": "send them as input",
        "previous_response_id": _NOTHING_IS_STORED,
        "prompt": "no prompts are stored here; send its text as instructions or input",
        "reasoning_effort": "send reasoning.effort",
        "response_format": "send text.format",
        "truncation": "send no more than the model's context has room for",
    }

    model_config = ConfigDict(json_schema_extra={"allOf": _RULES})

    input: Input
    instructions: str | None = None
    max_output_tokens: Annotated[Count | None, Field(json_schema_extra=at_most("max_model_len"))] = None
    top_logprobs: NumLogprobs | None = None
    include: Annotated[list[Annotated[str, WithJsonSchema(_INCLUDED)]], Field(max_length=16, fail_fast=True)] | None = (
        None
    )
    stream_options: ResponseStreamOptions | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: Literal["none", "auto"] | None = None
    max_tool_calls: Count | None = None

    @field_validator("input", mode="before", json_schema_input_type=str | Input)
    @classmethod
    def _count_and_refuse_other_items(cls, items: Any, info: ValidationInfo) -> Any:
        """A text is what a user says."""
        if isinstance(items, str):
            return [{"role": "user", "content": items}]
        if not isinstance(items, list):
            raise InvalidRequest("input must be a text, or a list of messages", param="input", code="invalid_value")
        for item in counted(items, info, "input"):
            if not isinstance(item, dict):
                continue
            _refuse_other("an item", item.get("type"), ("message",))
            content = item.get("content")
            for part in content if isinstance(content, list) else ():
                if isinstance(part, dict):
                    _refuse_other("content", part.get("type"), ("input_text", "output_text"))
        return items

    @model_validator(mode="after")
    def _check_between_fields(self) -> Self:
        for name in self.include or ():
            if name != LOGPROBS and name not in _OF_WHAT_THERE_IS_NOT:
                raise InvalidRequest(
                    f"{name[:100]!r} in include is not served", param="include", code="unsupported_parameter"
                )
        if self.top_logprobs and not self.tells_logprobs:
            raise InvalidRequest(f"top_logprobs needs {LOGPROBS!r} in include", param="top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
        return self

    @property
    def tells_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())


def _refuse_other(what: str, kind: Any, served: tuple[str, ...]) -> None:
    if isinstance(kind, str) and kind not in served:
        remedy = of_other_media(kind)
        if kind == "item_reference":
            remedy = "; nothing is stored here, so send the item itself"
        raise InvalidRequest(
            f"{what} of type {kind[:40]!r} in input is not served{remedy}", param="input", code="unsupported_parameter"
        )
