"""Functions that a model may call: as chat words them, and what is the same on routes with other words for them."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, WithJsonSchema, field_validator
from pydantic.config import JsonDict

from server.api.protocol.body import Body, limits_of, refuse_other_types
from server.api.protocol.json_text import text_of
from server.api.protocol.schema import at_most
from server.api.protocol.structured import NAME_PATTERN, checked_schema
from server.api.texts.speech import Tool, ToolsWanted
from server.errors import InvalidRequest

FunctionName = Annotated[str, Field(pattern=NAME_PATTERN)]
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}  # for functions that say nothing of theirs
_LISTED = 10  # names in one refusal
_OBJECT: JsonDict = {"type": "object"}


def checked_parameters(value: Any, param: str = "tools") -> dict[str, Any]:
    """The schema of a function's arguments. Raises InvalidRequest."""
    schema = checked_schema(value, param)
    if schema.get("type", "object") != "object":
        raise InvalidRequest(
            f'the parameters of a function in {param} must be a schema of an object: "type": "object" with properties',
            param=param,
            code="invalid_grammar",
        )
    text_of(schema, param, "invalid_grammar")  # a template would write a number for which JSON has no word
    return schema


def few_tools(tools: Any, info: ValidationInfo, param: str = "tools") -> Any:
    """Counted before they are built."""
    most = limits_of(info).max_tools
    if isinstance(tools, list) and len(tools) > most:
        raise InvalidRequest(f"{len(tools):,} tools; at most {most:,} are served", param=param, code="invalid_value")
    return tools


class FunctionFields(Body):
    WITHIN = "tools"

    name: FunctionName
    description: str | None = None
    parameters: Annotated[dict[str, Any], WithJsonSchema(_OBJECT)] | None = None
    strict: bool | None = None

    @field_validator("parameters", mode="before")
    @classmethod
    def _check_parameters(cls, value: Any) -> Any:
        return None if value is None else checked_parameters(value)

    @property
    def tool(self) -> Tool:
        return Tool(self.name, self.description, self.parameters or NO_ARGUMENTS, bool(self.strict))


class Function(FunctionFields):
    WITHIN = "tools.function"


class FunctionTool(Body):
    WITHIN = "tools"
    SHAPE = '{"type": "function", "function": {"name": …, "description": …, "parameters": {…}}}'

    type: Literal["function"]
    function: Function


def functions_only(value: Any, info: ValidationInfo) -> Any:
    """Of `tools`, before they are built. Raises InvalidRequest."""
    refuse_other_types(few_tools(value, info), "tools", ("function",), "tools")
    return value


Tools = Annotated[
    list[FunctionTool],
    Field(fail_fast=True, json_schema_extra=at_most("max_tools", is_list=True)),
    BeforeValidator(functions_only),
]


class NamedFunction(Body):
    WITHIN = "tool_choice.function"

    name: str


class NamedTool(Body):
    WITHIN = "tool_choice"
    SHAPE = '{"type": "function", "function": {"name": …}}'

    type: Literal["function"]
    function: NamedFunction


def names_only(value: Any, info: ValidationInfo) -> Any:
    """Of those that `tool_choice` allows, before they are built. Raises InvalidRequest."""
    refuse_other_types(few_tools(value, info, "tool_choice"), "tools", ("function",), "tool_choice", " in tool_choice")
    return value


class Allowed(Body):
    WITHIN = "tool_choice.allowed_tools"

    mode: Literal["auto", "required"]
    tools: Annotated[
        list[NamedTool],
        Field(min_length=1, fail_fast=True, json_schema_extra=at_most("max_tools", is_list=True)),
        BeforeValidator(names_only),
    ]


class AllowedTools(Body):
    WITHIN = "tool_choice"

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


_WORDS = ("none", "auto", "required")


def form_of_choice(value: Any, named: type[Body]) -> str:
    """Each is told from the others by itself: of a plain union, pydantic would try every one. `named`: the form that
    names a function. Raises InvalidRequest for what is none of them."""
    if isinstance(value, str) and value in _WORDS:
        return "a word"
    if not isinstance(value, dict):
        told = f'tool_choice must be "none", "auto", "required" or {named.SHAPE}'
        raise InvalidRequest(told, param="tool_choice", code="invalid_value")
    refuse_other_types(value, "tool_choice", ("function", "allowed_tools"), "tool_choice")
    return "some tools" if value.get("type") == "allowed_tools" else "a tool"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a word")]
    | Annotated[NamedTool, Tag("a tool")]
    | Annotated[AllowedTools, Tag("some tools")],
    Discriminator(lambda value: form_of_choice(value, NamedTool)),
]


class Choosing(NamedTuple):
    """Among the tools, in no route's words: whether the model `must` call, and which it may call (None: all of them).
    `parallel` False: one call at most."""

    must: bool = False
    only: frozenset[str] | None = None
    parallel: bool = True


def tools_wanted(tools: Sequence[Tool], choosing: Choosing | None, param: str = "tool_choice") -> ToolsWanted | None:
    """`choosing` None: nothing shall be called, and the model is not told of the tools either. Raises InvalidRequest
    for a name that two tools have, and for one that none has."""
    names = [it.name for it in tools]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"two tools have the name {twice!r}", param="tools", code="invalid_value")
    if choosing is None or (not tools and not choosing.must and choosing.only is None):
        return None
    if not tools:
        raise InvalidRequest(f"{param} asks for a call, and there are no tools to call", param=param,
                             code="invalid_value")  # fmt: skip
    for name in sorted((choosing.only or frozenset()) - set(names)):
        known = ", ".join(names[:_LISTED]) + ", …" * (len(names) > _LISTED)
        raise InvalidRequest(f"{param} names {name[:100]!r}, which is none of the tools: {known}", param=param,
                             code="invalid_value")  # fmt: skip
    return ToolsWanted(tools, choosing.must, choosing.only, choosing.parallel)


def chosen(choice: ToolChoice | None, parallel: bool) -> Choosing | None:
    """What chat's `tool_choice` says. A function that is named is called once."""
    if isinstance(choice, NamedTool):
        return Choosing(True, frozenset({choice.function.name}), parallel=False)
    if isinstance(choice, AllowedTools):
        allowed = choice.allowed_tools
        return Choosing(allowed.mode == "required", frozenset(it.function.name for it in allowed.tools), parallel)
    return None if choice == "none" else Choosing(choice == "required", None, parallel)
