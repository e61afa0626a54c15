"""Tools and formats as /v1/responses words them: flat, where chat's lie in an object of their own."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, WithJsonSchema

from server.api.protocol.body import Body, Unserved, refuse_other_types
from server.api.protocol.schema import at_most
from server.api.protocol.structured import FORMATS, NamedSchema, schema_source
from server.api.protocol.tools import Choosing, FunctionFields, form_of_choice, functions_only, names_only
from server.grammars.source import GrammarSource


class ResponseTool(FunctionFields):
    SHAPE = '{"type": "function", "name": …, "description": …, "parameters": {…}}'
    UNSERVED: ClassVar[Unserved] = {
        "allowed_callers": (["direct"],), "async": (False,), "defer_loading": (False,), "output_schema": (),
    }  # fmt: skip

    type: Literal["function"]

    @property
    def told(self) -> dict[str, Any]:
        """As it was understood."""
        return {"type": "function", "name": self.name, "description": self.description, "parameters": self.parameters,
                "strict": bool(self.strict)}  # fmt: skip


ResponseTools = Annotated[
    list[ResponseTool],
    Field(fail_fast=True, json_schema_extra=at_most("max_tools", is_list=True)),
    BeforeValidator(functions_only),
]


class NamedTool(Body):
    WITHIN = "tool_choice"
    SHAPE = '{"type": "function", "name": …}'

    type: Literal["function"]
    name: str


class AllowedTools(Body):
    WITHIN = "tool_choice"

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[NamedTool],
        Field(min_length=1, fail_fast=True, json_schema_extra=at_most("max_tools", is_list=True)),
        BeforeValidator(names_only),
    ]


ResponseToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("a word")]
    | Annotated[NamedTool, Tag("a tool")]
    | Annotated[AllowedTools, Tag("some tools")],
    Discriminator(lambda value: form_of_choice(value, NamedTool)),
]


def chosen(choice: ResponseToolChoice | None, parallel: bool) -> Choosing | None:
    """A function that is named is called once."""
    if isinstance(choice, NamedTool):
        return Choosing(True, frozenset({choice.name}), parallel=False)
    if isinstance(choice, AllowedTools):
        return Choosing(choice.mode == "required", frozenset(it.name for it in choice.tools), parallel)
    return None if choice == "none" else Choosing(choice == "required", None, parallel)


# -- formats ---


_SHAPE = '{"type": "json_schema", "name": …, "schema": {…}}'


class PlainFormat(Body):
    WITHIN, SHAPE = "text.format", _SHAPE

    type: Literal["text", "json_object"]

    @property
    def source(self) -> GrammarSource | None:
        return schema_source(None, "text") if self.type == "json_object" else None


class SchemaFormat(NamedSchema):
    WITHIN, SHAPE = "text.format", _SHAPE

    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], WithJsonSchema({"type": "object"})] = Field(alias="schema")

    @property
    def source(self) -> GrammarSource:
        return schema_source(self.schema_, "text")


def _format(value: Any) -> str:
    refuse_other_types(value, "text.format", FORMATS, "text")
    return "a schema" if isinstance(value, dict) and value.get("type") == "json_schema" else "a plain one"


Format = Annotated[
    Annotated[PlainFormat, Tag("a plain one")] | Annotated[SchemaFormat, Tag("a schema")], Discriminator(_format)
]


class TextConfig(Body):
    WITHIN = "text"
    SHAPE = f'{{"format": {_SHAPE}}}'
    UNSERVED: ClassVar[Unserved] = {"verbosity": ()}

    format: Format | None = None

    @property
    def source(self) -> GrammarSource | None:
        return None if self.format is None else self.format.source
