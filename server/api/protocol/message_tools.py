"""Tools, formats and thinking as /v1/messages words them."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, WithJsonSchema, field_validator, model_validator
from pydantic.config import ConfigDict, JsonDict

from server.api.protocol.body import Body, Count, Unserved, refuse_other_types
from server.api.protocol.message_blocks import CacheControl
from server.api.protocol.schema import NOTHING, at_most, given
from server.api.protocol.structured import checked_schema, schema_source
from server.api.protocol.tools import Choosing, checked_parameters, few_tools
from server.api.texts.speech import Tool
from server.errors import InvalidRequest
from server.grammars.source import GrammarSource

_OBJECT: JsonDict = {"type": "object"}


_TOOL = '{"name": …, "description": …, "input_schema": {…}}'


class MessageTool(Body):
    """Arguments are streamed as they come, with `eager_input_streaming` and without."""

    WITHIN, SHAPE = "tools", _TOOL
    UNSERVED: ClassVar[Unserved] = {
        "allowed_callers": (["direct"],), "defer_loading": (False,), "eager_input_streaming": (True, False),
        "input_examples": ([],),
    }  # fmt: skip

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,128}$")]
    input_schema: Annotated[dict[str, Any], WithJsonSchema(_OBJECT)]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None

    @field_validator("input_schema", mode="before")
    @classmethod
    def _check_schema(cls, value: Any) -> Any:
        return checked_parameters(value)

    @property
    def tool(self) -> Tool:
        return Tool(self.name, self.description, self.input_schema, bool(self.strict))


def _tools(value: Any, info: ValidationInfo) -> Any:
    remedies = {"function": f"a function is {_TOOL} here"}
    refuse_other_types(few_tools(value, info), "tools", ("custom",), "tools", remedies=remedies)
    return value


MessageTools = Annotated[
    list[MessageTool],
    Field(fail_fast=True, json_schema_extra=at_most("max_tools", is_list=True)),
    BeforeValidator(_tools),
]

_CHOICES: JsonDict = {
    "anyOf": [
        {"properties": {"type": {"enum": ["auto", "any"]}, "name": NOTHING}},
        {"properties": {"type": {"const": "none"}, "name": NOTHING, "disable_parallel_tool_use": NOTHING}},
        given(type={"const": "tool"}, name={"type": "string"}),
    ]
}


class MessageToolChoice(Body):
    WITHIN = "tool_choice"
    SHAPE = '{"type": "auto"}, "any" or "none", or {"type": "tool", "name": …}'

    model_config = ConfigDict(json_schema_extra=_CHOICES)

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_types(cls, it: Any) -> Any:
        remedies = {"function": 'a function is {"type": "tool", "name": …} here'}
        refuse_other_types(it, "tool_choice", ("auto", "any", "tool", "none"), "tool_choice", remedies=remedies)
        return it

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.name is not None) != (self.type == "tool"):
            told = "needs a name" if self.name is None else "has no name"
            raise InvalidRequest(f"tool_choice of type {self.type!r} {told}", param="tool_choice",
                                 code="invalid_value")  # fmt: skip
        if self.type == "none" and self.disable_parallel_tool_use is not None:
            raise InvalidRequest("disable_parallel_tool_use is for a tool_choice that lets tools be called",
                                 param="tool_choice", code="invalid_value")  # fmt: skip
        return self


def chosen(choice: MessageToolChoice | None) -> Choosing | None:
    """A tool that is named is called once."""
    if choice is None:
        return Choosing()
    if choice.type == "tool":
        return Choosing(True, frozenset({choice.name or ""}), parallel=False)
    parallel = not choice.disable_parallel_tool_use
    return None if choice.type == "none" else Choosing(choice.type == "any", None, parallel)


# -- formats, and thinking ---


class OutputFormat(Body):
    WITHIN = "output_config.format"
    SHAPE = '{"type": "json_schema", "schema": {…}}'

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], WithJsonSchema(_OBJECT)] = Field(alias="schema")

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_types(cls, it: Any) -> Any:
        refuse_other_types(it, "output_config.format", ("json_schema",), "output_config")
        return it

    @field_validator("schema_", mode="before")
    @classmethod
    def _check_schema(cls, value: Any) -> Any:
        return checked_schema(value, "output_config")

    @property
    def source(self) -> GrammarSource:
        return schema_source(self.schema_, "output_config")


class OutputConfig(Body):
    """`effort` is the template's variable `reasoning_effort`."""

    WITHIN = "output_config"
    SHAPE = '{"format": {"type": "json_schema", "schema": {…}}}'

    effort: Literal["low", "medium", "high", "xhigh"] | None = None
    format: OutputFormat | None = None


_BUDGETS: JsonDict = {
    "anyOf": [{"properties": {"type": {"const": "enabled"}}}, {"properties": {"budget_tokens": NOTHING}}]
}


class Thinking(Body):
    """`enabled` and `adaptive` are one thing: the model thinks, as long as it finds right."""

    WITHIN = "thinking"
    UNSERVED: ClassVar[Unserved] = {"display": ()}
    REMEDIES = {"display": "thinking comes as the model wrote it"}

    model_config = ConfigDict(json_schema_extra=_BUDGETS)

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Count | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.budget_tokens is not None and self.type != "enabled":
            raise InvalidRequest(f"thinking of type {self.type!r} has no budget_tokens", param="thinking",
                                 code="invalid_value")  # fmt: skip
        return self

    def check_budget(self, max_tokens: int) -> None:
        """Nobody watches a budget, but one that ends where the answer does. Raises InvalidRequest."""
        if self.budget_tokens is not None and self.budget_tokens < max_tokens - 1:
            raise InvalidRequest(
                f"thinking.budget_tokens is {self.budget_tokens:,} of {max_tokens:,} max_tokens, and budgets of "
                'thinking are not served; send thinking: {"type": "adaptive"}',
                param="thinking",
                code="unsupported_parameter",
            )

    @property
    def is_on(self) -> bool:
        return self.type != "disabled"
