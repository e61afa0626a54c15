"""The body of POST /v1/responses: OpenAI's, as far as it needs nothing that the server would have to remember."""

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, WithJsonSchema, field_validator, model_validator
from pydantic.config import JsonDict

from server.api.protocol.body import Body, Count, Unserved
from server.api.protocol.generation import STREAM_OPTIONS, NumLogprobs, SamplingBody
from server.api.protocol.response_input import Input, counted_items, turns
from server.api.protocol.response_tools import ResponseToolChoice, ResponseTools, TextConfig, chosen
from server.api.protocol.schema import at_most, given
from server.api.protocol.tools import tools_wanted
from server.api.texts.speech import ToolsWanted
from server.errors import InvalidRequest
from server.grammars.source import GrammarSource

LOGPROBS = "message.output_text.logprobs"
# of items that no answer has, and images that no request may send: there is nothing to include
_OF_WHAT_THERE_IS_NOT = frozenset({
    "code_interpreter_call.outputs", "computer_call_output.output.image_url", "file_search_call.results",
    "message.input_image.image_url", "reasoning.encrypted_content", "web_search_call.action.sources",
    "web_search_call.results",
})  # fmt: skip
_NOTHING_IS_STORED = "nothing is stored here; send the whole conversation as input"


class Reasoning(Body):
    WITHIN = "reasoning"
    UNSERVED: ClassVar[Unserved] = {
        "summary": ("auto",), "generate_summary": (), "context": ("auto",), "mode": ("standard",),
    }  # fmt: skip

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class ResponseStreamOptions(Body):
    """The last event tells the usage in any case."""

    WITHIN = "stream_options"
    UNSERVED: ClassVar[Unserved] = {"include_obfuscation": (False,), "include_usage": (True, False)}


_INCLUDED: JsonDict = {"type": "string", "enum": [LOGPROBS, *sorted(_OF_WHAT_THERE_IS_NOT)]}
_RULES: list[JsonValue] = [
    STREAM_OPTIONS,
    {"anyOf": [
        given(include={"type": "array", "contains": {"const": LOGPROBS}}),
        {"properties": {"top_logprobs": {"enum": [None, 0]}}},
    ]},
]  # fmt: skip


class ResponseBody(SamplingBody):
    """`max_tool_calls` is a limit of OpenAI's own tools, of which there are none here, and comes back as sent."""

    UNSERVED: ClassVar[Unserved] = {
        **SamplingBody.UNSERVED, "access_programs": (), "background": (False,), "background_options": (),
        "context_management": ([],), "conversation": (), "image": (), "max_completion_tokens": (), "max_tokens": (),
        "messages": (), "n": (1,), "previous_response_id": (), "prompt": (),
        "reasoning_effort": (), "response_format": ({"type": "text"},), "truncation": ("disabled",),
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
    tools: ResponseTools | None = None
    tool_choice: ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Count | None = None

    _count = field_validator("input", mode="before", json_schema_input_type=str | Input)(counted_items)

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
        _ = self.said, self.tools_wanted
        return self

    @property
    def tells_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    @property
    def own_source(self) -> GrammarSource | None:
        return None if self.text is None else self.text.source

    @cached_property
    def said(self) -> list[dict[str, Any]]:
        """As templates read it. Raises InvalidRequest."""
        said = turns(self.input)
        return [{"role": "system", "content": self.instructions}, *said] if self.instructions else said

    @cached_property
    def tools_wanted(self) -> ToolsWanted | None:
        """Raises InvalidRequest."""
        choosing = chosen(self.tool_choice, self.parallel_tool_calls is not False)
        return tools_wanted([it.tool for it in self.tools or ()], choosing)

    # -- what an answer says of its request ---

    @property
    def tools_told(self) -> list[dict[str, Any]]:
        return [it.told for it in self.tools or ()]

    @property
    def choice_told(self) -> Any:
        choice = self.tool_choice or "auto"
        return choice if isinstance(choice, str) else choice.model_dump()

    @property
    def format_told(self) -> dict[str, Any]:
        format = None if self.text is None else self.text.format
        return {"type": "text"} if format is None else format.model_dump(by_alias=True)
